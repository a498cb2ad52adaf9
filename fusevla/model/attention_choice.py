"""Which attention runs where: fused forms where they win, each after a check that it agrees with the plain one.

======================= ==================== =====================================================================================
device                  best first           why
======================= ==================== =====================================================================================
CPU                     plain                measured: on two cores a step of ``bench_train --size medium`` is faster than by xla
NVIDIA, sm_90 and later cudnn, xla, plain    JAX's cuDNN kernel takes head_dim 256 from sm_90 on, in bfloat16; before JAX 0.11.1
                                             its backward pass also makes a gradient of the mask. Not measured on a GPU yet
all others              xla, plain           below sm_90 (A100: sm_80) that kernel stops at head_dim 128. Not measured yet
======================= ==================== =====================================================================================

``implementation=None`` of ``jax.nn.dot_product_attention`` is never used: what it means is JAX's to change. Tokamax's kernels
for sm_90 need Python 3.12, and are no dependency.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Array, Bool
from fusevla.model.attention import Implementation, attention
from fusevla.model.masks import with_action_blocks
from fusevla.presets import ModelConfig, Preset

__all__ = ["candidates", "choose", "disagreement", "on_this_device", "with_attention"]

TOLERANCE = {"bfloat16": 3e-2, "float32": 5e-3}
"""Largest difference over the largest value. Wide enough for TF32 products; a mask or a scale that is wrong is off by about 1."""
PREFIX, DRAWS, HORIZON = 24, 2, 5


def candidates(platform: str, capability: str | None = None) -> tuple[Implementation, ...]:
    """What may run on a device, best first; ``capability`` is CUDA's, as "9.0"."""
    if platform == "cpu":
        return ("plain",)
    major = (capability or "").partition(".")[0]
    if platform in ("gpu", "cuda") and major.isdigit() and int(major) >= 9:
        return ("cudnn", "xla", "plain")
    return ("xla", "plain")


def choose(config: ModelConfig, device: Any = None, say: Callable[[str], object] = print) -> Implementation:
    """The first candidate for ``device`` (the first there is by default) that agrees with "plain"; says why others do not."""
    device = jax.devices()[0] if device is None else device
    for name in candidates(device.platform, getattr(device, "compute_capability", None)):
        reason = None if name == "plain" else disagreement(config, name)
        if reason is None:
            return name
        say(f"attention: not {name} on {device.device_kind}: {reason}")
    return "plain"


def with_attention(config: ModelConfig, device: Any = None) -> ModelConfig:
    """The same sizes with an attention that can run: "auto" resolved, anything else as it is."""
    return dataclasses.replace(config, attention=choose(config, device)) if config.attention == "auto" else config


def on_this_device(preset: Preset) -> Preset:
    """The preset with its attention resolved. What is stored keeps "auto", so that a run may go on elsewhere."""
    return dataclasses.replace(preset, model=with_attention(preset.model))


def disagreement(config: ModelConfig, name: Implementation) -> str | None:
    """Why ``name`` cannot stand in for "plain" with these heads and this dtype; None where output and gradients agree."""
    try:
        expected, got = (jax.device_get(_results(config, which)) for which in ("plain", name))
    except Exception as error:  # whatever a kernel's library raises, from refusing a shape to failing to load
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
    for part, ours, theirs in zip(("output", "gradient of q", "gradient of k", "gradient of v"), expected, got, strict=True):
        difference = np.abs(theirs - ours).max() / np.abs(ours).max()
        if not difference <= TOLERANCE[config.dtype]:  # not a number is a difference
            return f"its {part} differs from plain's by {difference:.2g} (at most {TOLERANCE[config.dtype]:g} is rounding)"
    return None


def _results(config: ModelConfig, name: Implementation) -> tuple[jax.Array, ...]:
    """(output, gradients of q, k, v) in float32 of one small training-like call."""
    expert, mask = config.language, _mask()
    heads = (expert.num_heads, expert.num_kv_heads, expert.num_kv_heads)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*mask.shape[:2], count, expert.head_dim) for count in heads]
    q, k, v = (jax.random.normal(key, shape, config.dtype) for key, shape in zip(keys[:3], shapes, strict=True))
    sees = mask.any(axis=-1)[..., None, None]
    weights = jnp.where(sees, jax.random.normal(keys[3], q.shape), 0.0)  # a row that sees nothing means nothing

    def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        output = attention(q * expert.head_dim**-0.5, k, v, mask, name).astype(jnp.float32)
        return jnp.sum(output * weights), jnp.where(sees, output, 0.0)

    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes inside, in its gradients too
        gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return (output, *(gradient.astype(jnp.float32) for gradient in gradients))


def _mask() -> Bool[jax.Array, "b q k"]:
    """Of a sample that reasons and a shorter one that acts: a prefix, a causal suffix, padding, then blocks of actions."""
    at = jnp.arange(PREFIX)[None]
    valid = at < jnp.array([[PREFIX], [PREFIX - 7]])
    ar = (at >= jnp.array([[PREFIX - 9], [PREFIX - 8]])) & valid
    return jnp.asarray(with_action_blocks(valid, ar, DRAWS, HORIZON)[0])
