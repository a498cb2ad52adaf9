"""Low-rank adapters: put on, taken off, merged (Hu et al. 2021; rsLoRA: Kalajdzievski 2023)."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Key
from fusevla.model.gemma import Expert
from fusevla.model.layers import Einsum, LowRank
from fusevla.presets import LoraConfig

ATTENTION = ("q", "kv", "out")
FEED_FORWARD = ("gating", "linear")
INIT_STD = 0.01


def adapters_of(expert: Expert) -> list[LowRank | None]:
    """The adapter slots of an expert: q, kv, out, gating, linear."""
    return [getattr(expert.layers, name).adapter for name in (*ATTENTION, *FEED_FORWARD)]


def attach_lora(expert: Expert, config: LoraConfig | None, key: Key) -> Expert:
    """Fills the adapter slots that ``config`` names: A normal(0.01), B zero, float32; the base leaves are untouched.

    B at zero makes step 0 equal the base model bit for bit. ``None`` takes every adapter off.
    """
    names = _adapted(config)
    for name, part in zip((*ATTENTION, *FEED_FORWARD), jax.random.split(key, 5), strict=True):
        weight = getattr(expert.layers, name).weight
        adapter = _init_adapter(weight.shape, config, name in FEED_FORWARD, part) if config and name in names else None
        expert = _replaced(expert, name, Einsum(weight, adapter))
    return expert


def merge_adapters(expert: Expert) -> Expert:
    """Adds each adapter's update to its weight and takes the adapter off: the same function, fewer matrix products.

    The update is ``scale * A B``. The output projection sums over heads in A and again in B, so there every head's A meets
    the B that is summed over heads. Weights keep their dtype: merging into bfloat16 rounds.
    """
    for name in (*ATTENTION, *FEED_FORWARD):
        part: Einsum = getattr(expert.layers, name)
        if part.adapter is not None:
            layer = partial(_merged, sums_heads=name == "out")  # one at a time: float32 copies of all would double the memory
            expert = _replaced(expert, name, Einsum(jax.lax.map(layer, part)))
    return expert


def _adapted(config: LoraConfig | None) -> tuple[str, ...]:
    if config is None:
        return ()
    return (ATTENTION if config.attention else ()) + (FEED_FORWARD if config.feed_forward else ())


def _init_adapter(shape: tuple[int, ...], config: LoraConfig, feed_forward: bool, key: Key) -> LowRank:
    a = jax.random.normal(key, (*shape[:-1], config.rank), jnp.float32) * INIT_STD
    scale = 1.0 if feed_forward and not config.scale_feed_forward else config.scale
    return LowRank(a, jnp.zeros((*shape[:-2], config.rank, shape[-1]), jnp.float32), scale)


def _replaced(expert: Expert, name: str, part: Einsum) -> Expert:
    changes: dict[str, Any] = {name: part}
    return dataclasses.replace(expert, layers=dataclasses.replace(expert.layers, **changes))


def _merged(part: Einsum, sums_heads: bool) -> Array:
    """One layer's weight with its update, multiplied out in full float32 (GPUs would take TF32 unasked)."""
    adapter = cast(LowRank, part.adapter)
    a, b = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32)
    b = jnp.broadcast_to(jnp.sum(b, axis=-3, keepdims=True), b.shape) if sums_heads else b
    update = adapter.scale * jnp.matmul(a, b, precision="highest")
    return (part.weight.astype(jnp.float32) + update).astype(part.weight.dtype)
