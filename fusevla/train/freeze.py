"""Which leaves train: decided by the structure of the model (module types and getters), never by names.

====================== ================================================================================================
``llm``                in each expert that carries LoRA, every leaf that is not LoRA is frozen; the embedder follows the
                       language expert; the image tower and the action heads train in full (the published recipe)
``all_but_lora``       only LoRA and the action heads train
``none``               everything trains
====================== ================================================================================================

Frozen leaves are bfloat16 and trainable leaves float32, whatever the compute dtype.
"""

from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from fusevla.model.fuse import Pi0Fuse
from fusevla.model.layers import Dense, Einsum, Embedder, LowRank
from fusevla.model.siglip import Projection
from fusevla.model.storage import stored
from fusevla.presets import Base, Freeze

T = TypeVar("T")

FROZEN_DTYPE = jnp.bfloat16
TRAINABLE_DTYPE = jnp.float32
MATRIX: dict[type, str] = {Einsum: "weight", Dense: "kernel", Projection: "kernel", Embedder: "table"}
"""Where modules hold the matrix that may be stored in another form."""


class FreezeError(ValueError):
    """A freeze mode that leaves nothing sensible to train."""


def _is_adapter(node: object) -> bool:
    return isinstance(node, LowRank)


def _constant(tree: T, value: bool) -> T:
    return cast(T, jax.tree.map(lambda _: value, tree))


def _adapters_only(tree: T) -> T:
    """True on the leaves of low-rank adapters, False on all others."""
    return cast(T, jax.tree.map(lambda node: _constant(node, _is_adapter(node)), tree, is_leaf=_is_adapter))


def has_adapters(tree: object) -> bool:
    """Whether any linear map inside ``tree`` carries a low-rank adapter."""
    return any(_is_adapter(node) for node in jax.tree.leaves(tree, is_leaf=_is_adapter))


def _heads(model: Pi0Fuse) -> tuple[object, ...]:
    return model.action_in_proj, model.time_mlp_in, model.time_mlp_out, model.action_out_proj


def _freeze_llm(model: Pi0Fuse) -> Pi0Fuse:
    spec = _constant(model, True)
    if has_adapters(model.language):
        frozen = (_adapters_only(model.language), _constant(model.embedder, False))
        spec = eqx.tree_at(lambda m: (m.language, m.embedder), spec, frozen)
    if has_adapters(model.action):
        spec = eqx.tree_at(lambda m: m.action, spec, _adapters_only(model.action))
    return spec


def trainable_spec(model: Pi0Fuse, mode: Freeze) -> Pi0Fuse:
    """A tree of bools in the shape of ``model``: True where a leaf trains (a filter for ``eqx.partition``).

    Leaves may be arrays or ``jax.ShapeDtypeStruct``. Raises ``FreezeError`` for ``all_but_lora`` without LoRA.
    """
    if mode == "none":
        return _constant(model, True)
    if mode == "llm":
        return _freeze_llm(model)
    if not has_adapters(model):
        raise FreezeError(
            "freeze=all_but_lora trains only LoRA and the action heads, but neither expert carries LoRA: "
            "attach it (--lora) or choose freeze=llm or freeze=none"
        )
    return eqx.tree_at(_heads, _adapters_only(model), _constant(_heads(model), True))


def dtype_spec(model: Pi0Fuse, mode: Freeze) -> Pi0Fuse:
    """The dtype each leaf is stored in: float32 where it trains, bfloat16 where it is frozen."""
    pick = {True: jnp.dtype(TRAINABLE_DTYPE), False: jnp.dtype(FROZEN_DTYPE)}
    return cast(Pi0Fuse, jax.tree.map(lambda trains: pick[trains], trainable_spec(model, mode)))


def partition(model: Pi0Fuse, mode: Freeze) -> tuple[Pi0Fuse, Pi0Fuse]:
    """(trainable, frozen): two models with None in each other's places, cast to float32 and bfloat16.

    ``eqx.combine(trainable, frozen)`` is the model again.
    """
    trainable, frozen = eqx.partition(model, trainable_spec(model, mode))
    return cast_leaves(trainable, TRAINABLE_DTYPE), cast_leaves(frozen, FROZEN_DTYPE)


def cast_leaves(tree: T, dtype: jax.typing.DTypeLike) -> T:
    """Every leaf in ``dtype``; a leaf that has it already is passed on, not copied. Works on abstract leaves too."""

    def cast_leaf(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        if leaf.dtype == dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return jnp.asarray(leaf, dtype)

    return cast(T, jax.tree.map(cast_leaf, tree))


def store(frozen: Pi0Fuse, base: Base) -> Pi0Fuse:
    """The frozen leaves as they are kept during training: matrices of layers, and the table, as ``base`` says; others stay.

    What comes of it goes where ``frozen`` went: ``eqx.combine(trainable, store(frozen, base))`` is a model. Leaves may be
    abstract.
    """
    parts = lambda m: (m.vision.layers, m.language.layers, m.action.layers, m.embedder)
    return eqx.tree_at(parts, frozen, [_store_matrices(part, base) for part in parts(frozen)], is_leaf=lambda x: x is None)


def _store_matrices(tree: T, base: Base) -> T:
    """By the type of the module that holds them: stacked norms and biases have two axes as well."""

    def of_module(node: Any) -> Any:
        name = MATRIX.get(type(node))
        if name is None or getattr(node, name) is None:
            return node
        return eqx.tree_at(lambda node: getattr(node, name), node, stored(getattr(node, name), base))

    return cast(T, jax.tree.map(of_module, tree, is_leaf=lambda node: type(node) in MATRIX))


def count_parameters(tree: object) -> int:
    """Number of scalars in all leaves, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
