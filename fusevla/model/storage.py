"""How frozen matrices are kept between steps: bfloat16, int8 or NF4, read back into bfloat16 by the layer that needs them.

A stored matrix stands where the array stood. What uses it calls ``restore`` *inside* its checkpointed block, so that only one
layer's weights exist as numbers at a time, in the backward pass too. Even bfloat16 is kept as its bits (uint16): XLA for CPUs
computes in float32 and would otherwise keep a float32 copy of a whole stack of layers throughout the step.

int8 and NF4 are block-wise, a scale for each run of up to 64 weights along the last axis (Dettmers et al. 2022, arXiv
2110.02861; NF4 and its code book: QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E). Frozen weights are read, never
changed, so that the rounding happens once.
"""

from functools import partial
from typing import TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Int8, UInt8, UInt16

from fusevla.arrays import Array, Float
from fusevla.presets import Base

T = TypeVar("T")
BLOCK = 64
"""Weights that share a scale, at most."""
ROWS = 8192
"""Rows of a table that are quantised together."""
DTYPE = jnp.bfloat16
"""What stored weights are read as."""
NF4_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution, scaled to [-1, 1], zero among them."""


class Bits(eqx.Module):
    """bfloat16 as it lies in memory."""

    bits: UInt16[Array, "*axes outputs"]

    def read(self) -> Float[Array, "*axes outputs"]:
        """The weights themselves."""
        return jax.lax.bitcast_convert_type(self.bits, DTYPE)


class EightBits(eqx.Module):
    """``codes / 127 * scale``, a scale per block of the last axis."""

    codes: Int8[Array, "*axes outputs"]
    scale: Float[Array, "*axes blocks"]

    def read(self) -> Float[Array, "*axes outputs"]:
        """The weights, rounded."""
        return _scaled(self.codes.astype(jnp.float32) / 127, self.scale)


class FourBits(eqx.Module):
    """``NF4_CODES[code] * scale``; a byte holds two codes: of a weight in the first half of the axis, and half an axis on."""

    codes: UInt8[Array, "*axes half"]
    scale: Float[Array, "*axes blocks"]

    def read(self) -> Float[Array, "*axes outputs"]:
        """The weights, rounded."""
        codes = jnp.concatenate([self.codes >> 4, self.codes & 15], axis=-1)
        return _scaled(jnp.asarray(NF4_CODES, jnp.float32)[codes], self.scale)


Stored = Bits | EightBits | FourBits


def is_stored(node: object) -> bool:
    """Whether ``node`` stands for an array."""
    return isinstance(node, Stored)


def restore(tree: T) -> T:
    """``tree`` with bfloat16 arrays where matrices were stored; where none were, as it is."""
    return cast(T, jax.tree.map(lambda node: node.read() if is_stored(node) else node, tree, is_leaf=is_stored))


def stored(weight: Array | jax.ShapeDtypeStruct, base: Base) -> Stored:
    """A bfloat16 matrix, or a stack of them, as ``base`` says; abstract where ``weight`` is.

    int8 and NF4 leave as bits what has too few weights in a row (less than 16) for a scale to pay.
    """
    block = _block(weight.shape[-1])
    make = {"bf16": to_bits, "int8": _to_eight, "nf4": _to_four}["bf16" if block < 16 or weight.shape[-1] % 2 else base]
    # A layer at a time, or some rows of a table: quantising computes in float32.
    pieces = partial(jax.lax.map, make, batch_size=None if weight.ndim > 2 else ROWS)
    return cast(Stored, jax.eval_shape(pieces, weight) if isinstance(weight, jax.ShapeDtypeStruct) else jax.jit(pieces)(weight))


def take_rows(table: Array | Stored, rows: Array) -> jax.Array:
    """``table[rows]`` along the first axis; of a stored table only those rows are read."""
    return cast(jax.Array, restore(jax.tree.map(lambda part: part[rows], table)))


def _block(length: int) -> int:
    """The longest run of at most ``BLOCK`` that divides an axis."""
    return next(size for size in range(BLOCK, 0, -1) if length % size == 0)


def to_bits(weight: Array) -> Bits:
    """A bfloat16 array as its bits."""
    return Bits(jax.lax.bitcast_convert_type(weight, jnp.uint16))


def _to_eight(weight: Array) -> EightBits:
    unit, scale = _normalized(weight)
    return EightBits(jnp.round(unit * 127).astype(jnp.int8), scale)


def _to_four(weight: Array) -> FourBits:
    unit, scale = _normalized(weight)
    book = jnp.asarray(NF4_CODES, jnp.float32)
    codes = jnp.searchsorted((book[1:] + book[:-1]) / 2, unit).astype(jnp.uint8)
    high, low = jnp.split(codes, 2, axis=-1)
    return FourBits(high << 4 | low, scale)


def _normalized(weight: Array) -> tuple[jax.Array, jax.Array]:
    """Weights over their block's largest, in [-1, 1], and that (bfloat16, rounded first so that reading undoes it)."""
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, _block(weight.shape[-1]))
    scale = jnp.max(jnp.abs(blocks), axis=-1).astype(DTYPE)
    divisor = jnp.where(scale == 0, 1.0, scale.astype(jnp.float32))[..., None]
    return jnp.clip(blocks / divisor, -1, 1).reshape(weight.shape), scale


def _scaled(unit: Array, scale: Array) -> jax.Array:
    blocks = unit.reshape(*scale.shape, -1) * scale.astype(jnp.float32)[..., None]
    return jnp.reshape(blocks, unit.shape).astype(DTYPE)
