"""How AdamW's two moments of the image tower are kept between steps: rounded to bfloat16, or to eight bits in blocks.

Eight bits as in "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2022, arXiv 2110.02861): numbers are divided by
the largest of their block, so that an outlier spoils no other block, and codes lie close together near zero. There a table says
where; here codes are the cube root. The second moment is kept as its square root, the number that a step is divided by.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int8

from fusevla.arrays import Array, Float, UInt8
from fusevla.model.fuse import Pi0Fuse
from fusevla.model.siglip import VisionLayer
from fusevla.presets import Moments

BLOCK = 256
"""Numbers that share a scale: one float32 for them is 1/64 of a byte for each."""


class Blocks(eqx.Module):
    """An array in eight bits: int8 codes for a first moment, uint8 for a second one.

    ``top * (code / top)**3`` for the largest code ``top`` is the number in units of its block's scale; blocks are ``BLOCK``
    neighbours of the flattened array, the last one shorter.
    """

    codes: Int8[Array, "*shape"] | UInt8[Array, "*shape"]
    scale: Float[Array, "*layers blocks"]


def encode_first(moment: Float[Array, "*shape"]) -> Blocks:
    """Signed; the error is half a code at most, and none for zero and for the largest of a block."""
    return _encode(moment, jnp.int8)


def encode_second(moment: Float[Array, "*shape"]) -> Blocks:
    """By the square root, which gets the smallest code rather than zero unless it is zero.

    A zero would leave a step undivided whose first moment is not.
    """
    return _encode(jnp.sqrt(moment), jnp.uint8)


def decode(blocks: Blocks) -> Float[Array, "*shape"]:
    """The moment, float32."""
    top = jnp.iinfo(blocks.codes.dtype).max
    root = _by_blocks(blocks.codes.astype(jnp.float32)) / top
    values = (root**3 * blocks.scale[:, None]).reshape(-1)[: blocks.codes.size].reshape(blocks.codes.shape)
    return values if blocks.codes.dtype == jnp.int8 else jnp.square(values)


def _encode(values: Array, dtype: jax.typing.DTypeLike) -> Blocks:
    top, blocks = jnp.iinfo(dtype).max, _by_blocks(values)
    scale = jnp.max(jnp.abs(blocks), axis=1)
    root = jnp.cbrt(blocks / jnp.where(scale > 0, scale, 1.0)[:, None])
    codes = jnp.round(root * top)
    if dtype == jnp.uint8:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), 0)
    return Blocks(codes.astype(dtype).reshape(-1)[: values.size].reshape(values.shape), scale)


def _by_blocks(values: Array) -> jax.Array:
    """[blocks, BLOCK], with zeros after the end."""
    flat = jnp.reshape(values, -1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def keep_tower_small(adam: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    """``adam`` (``optax.scale_by_adam``) for trees like ``Pi0Fuse``, with its moments of the image tower as ``moments`` says.

    Its state keeps its structure, but the tower's arrays are bfloat16, or ``Blocks`` of one layer each. The tower's layers are
    updated one after the other and in place: never are the moments of more than one there in float32.
    """
    if moments == "float32":
        return adam

    def init(params: optax.Params) -> optax.OptState:
        kept = jax.eval_shape(lambda tree: _keep(adam.init(tree), moments), params)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)  # what zeros are in every form

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.OptState]:
        del params
        return _update(adam, updates, state)

    return optax.GradientTransformation(init, update)


def _keep(state: Any, moments: Moments) -> optax.OptState:
    to_bfloat16 = lambda x: x.astype(jnp.bfloat16)
    first, second = (encode_first, encode_second) if moments == "int8" else (to_bfloat16, to_bfloat16)
    return optax.ScaleByAdamState(state.count, _map_tower(first, state.mu), _map_tower(second, state.nu))


def _map_tower(form: Callable[[Array], object], model: Pi0Fuse) -> Any:
    """``form`` of every array of the tower, layer by layer where layers are stacked."""
    tower = jax.tree.map(form, eqx.tree_at(lambda t: t.layers, model.vision, None))
    layers = jax.tree.map(jax.vmap(form), model.vision.layers)
    tower = eqx.tree_at(lambda t: t.layers, tower, layers, is_leaf=lambda x: x is None)
    return eqx.tree_at(lambda m: m.vision, model, tower)


def _update(adam: optax.GradientTransformation, updates: Pi0Fuse, state: Any) -> tuple[Any, optax.OptState]:
    trees = (updates, state.mu, state.nu)
    outside = [eqx.tree_at(_layers, tree, None) for tree in trees]
    count, *outside = _advance(adam, state.count, *outside)

    def of_layer(index: jax.Array, stacked: list[VisionLayer]) -> list[VisionLayer]:
        layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)
        _, *new = _advance(adam, state.count, *layer)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), stacked, new)

    layers = jax.lax.fori_loop(0, updates.config.vision.depth, of_layer, [_layers(tree) for tree in trees])
    whole = [eqx.tree_at(_layers, tree, part, is_leaf=lambda x: x is None) for tree, part in zip(outside, layers, strict=True)]
    return whole[0], optax.ScaleByAdamState(count, whole[1], whole[2])


def _layers(model: Pi0Fuse) -> Any:
    return model.vision.layers


def _advance(adam: optax.GradientTransformation, count: Any, updates: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any, Any]:
    """(count, updates, mu, nu) after one update of any tree, each moment in the form it came in."""
    new: Any
    updates, new = adam.update(updates, optax.ScaleByAdamState(count, _in_float32(mu), _in_float32(nu)))
    return new.count, updates, _in_form_of(mu, new.mu), _in_form_of(nu, new.nu)


def _is_blocks(node: object) -> bool:
    return isinstance(node, Blocks)


def _in_float32(tree: Any) -> Any:
    restore = lambda leaf: decode(leaf) if _is_blocks(leaf) else leaf.astype(jnp.float32)
    return jax.tree.map(restore, tree, is_leaf=_is_blocks)


def _in_form_of(kept: Any, tree: Any) -> Any:
    def form(like: Blocks | jax.Array, value: jax.Array) -> Blocks | jax.Array:
        if not isinstance(like, Blocks):
            return value.astype(like.dtype)
        return encode_first(value) if like.codes.dtype == jnp.int8 else encode_second(value)

    return jax.tree.map(form, kept, tree, is_leaf=_is_blocks)
