"""Floating-point operations of a training step, counted from sizes alone: one rule for every way to write the step.

Matrix products only, two operations for each multiply-add. XLA's own count is of no use here: it takes the body of a scan over
layers once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.presets import ExpertConfig, Freeze, ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step runs over."""

    batch: int
    cameras: int
    text: int
    """Text positions of a sample, padding included."""
    head_rows: int
    """Positions of the whole batch whose logits are computed."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Multiply-adds of a forward pass: by weights that train, by frozen ones, and between activations."""

    trained: float = 0.0
    frozen: float = 0.0
    free: float = 0.0

    @property
    def forward(self) -> float:
        return self.trained + self.frozen + self.free

    @property
    def backward(self) -> float:
        """Towards the activations once for every product, and once more towards what else has a gradient."""
        return 2 * self.trained + self.frozen + 2 * self.free


def train_flops(config: ModelConfig, freeze: Freeze, work: Workload, *, recomputed: bool = False) -> float:
    """Operations of forward and backward; with ``recomputed`` every layer's forward pass is counted twice.

    The image tower has a backward pass only where it trains. ``freeze`` is read as for a model that carries LoRA.
    """
    vision, layers, rest = _vision(config, freeze, work), _layers(config, freeze, work), _rest(config, freeze, work)
    backwards = layers.backward + rest.backward + (0.0 if freeze == "all_but_lora" else vision.backward)
    again = layers.forward + (0.0 if freeze == "all_but_lora" else vision.forward) if recomputed else 0.0
    return 2 * (vision.forward + layers.forward + rest.forward + backwards + again)


def _vision(config: ModelConfig, freeze: Freeze, work: Workload) -> _Part:
    v: VisionConfig = config.vision
    tokens = v.num_tokens * work.cameras * work.batch
    weights = v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + v.width * (3 * v.patch_size**2 + config.language.width)
    products = float(tokens * weights)
    attention = 2.0 * tokens * v.num_tokens * v.width * v.depth
    return _Part(frozen=products, free=attention) if freeze == "all_but_lora" else _Part(products, 0.0, attention)


def _layers(config: ModelConfig, freeze: Freeze, work: Workload) -> _Part:
    prefix = work.cameras * config.vision.num_tokens + work.text
    queries = prefix + config.action_horizon
    e = config.language
    attention = 2.0 * work.batch * queries**2 * e.num_heads * e.head_dim * e.depth
    tokens = {True: work.batch * prefix, False: work.batch * config.action_horizon}
    base = sum(tokens[x is e] * x.depth * _base_weights(x) for x in (e, config.action))
    adapters = sum(tokens[x is e] * x.depth * _adapter_weights(x) for x in (e, config.action))
    modulation = work.batch * config.action.depth * 6.0 * config.action.width**2
    if freeze == "none":
        return _Part(base + adapters + modulation, 0.0, attention)
    return _Part(float(adapters), base + modulation, attention)


def _base_weights(e: ExpertConfig) -> int:
    heads = 2 * e.num_heads + 2 * e.num_kv_heads
    return e.width * (heads * e.head_dim + 3 * e.mlp_dim)


def _adapter_weights(e: ExpertConfig) -> int:
    """A and B of q, kv, out (whose B is summed over heads before it is used), gating and linear."""
    if e.lora is None:
        return 0
    attention = (e.num_heads + 2 * e.num_kv_heads) * (e.width + e.head_dim) + e.num_heads * e.head_dim + e.width
    return e.lora.rank * (e.lora.attention * attention + e.lora.feed_forward * 3 * (e.width + e.mlp_dim))


def _rest(config: ModelConfig, freeze: Freeze, work: Workload) -> _Part:
    """The text head, the action heads and the last norm's modulation."""
    head = float(work.head_rows * config.vocab_size * config.language.width)
    width = config.action.width
    actions = work.batch * (2.0 * config.action_horizon * config.action_dim * width + 2.0 * width**2)
    modulation = work.batch * 3.0 * width**2
    if freeze == "none":
        return _Part(head + actions + modulation)
    return _Part(actions, head + modulation)


def matrix_rate(dtype: str, size: int, repeats: int, clock: Callable[[], float]) -> float:
    """Operations per second of a square matrix product in ``dtype`` on the default device, the best of ``repeats``."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), dtype)
    product: Any = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(x, x))
    taken = []
    for _ in range(repeats):
        began = clock()
        jax.block_until_ready(product(x, x))
        taken.append(clock() - began)
    return 2.0 * size**3 / min(taken)
