"""Stored matrices: bits lose nothing, codes are the nearest ones, and a step on them is a step on what they are read as."""

import dataclasses
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusevla.arrays import Array
from fusevla.losses import draw_flow, sample_losses
from fusevla.model.fuse import Pi0Fuse
from fusevla.model.gemma import Stream, transformer
from fusevla.model.layers import RMSNorm, checkpointed
from fusevla.model.storage import NF4_CODES, Bits, EightBits, FourBits, is_stored, restore, stored, take_rows
from fusevla.presets import Base, Freeze, Remat
from fusevla.train.freeze import partition, store
from tests.train.synthetic import MODEL, random_batch, small_model

BASES: tuple[Base, ...] = ("bf16", "int8", "nf4")
SHAPE = (3, 4, 64)
weights = hnp.arrays(np.float32, SHAPE, elements=st.floats(-100, 100, width=32)).map(lambda w: jnp.asarray(w, jnp.bfloat16))


def as_float(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


@given(weights)
def test_bits_are_the_weights(weight: jax.Array) -> None:
    kept = stored(weight, "bf16")
    assert isinstance(kept, Bits)
    assert kept.bits.dtype == jnp.uint16
    np.testing.assert_array_equal(as_float(restore(kept)), as_float(weight))


@given(weights, st.sampled_from(["int8", "nf4"]))
def test_every_weight_is_the_nearest_that_its_block_can_say(weight: jax.Array, base: Base) -> None:
    """Against a loop over blocks and codes. Between equally near codes either is right; the result is bfloat16."""
    book = np.arange(-127, 128) / 127 if base == "int8" else np.asarray(NF4_CODES)
    found, plain = as_float(restore(stored(weight, base))).reshape(-1, 64), as_float(weight).reshape(-1, 64)
    for row, original in zip(found, plain, strict=True):
        scale = np.abs(original).max()
        distance = np.abs(original[:, None] - scale * book).min(axis=1)
        np.testing.assert_array_less(np.abs(row - original), distance + 2**-8 * np.abs(row) + 1e-6 * scale + 1e-30)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 2, 128), (5, 48), (2, 3, 72), (9000, 16), (2, 3, 6), (3, 2, 17)], ids=str)
def test_shapes_and_dtypes_come_back_and_zeros_stay_zero(shape: tuple[int, ...], base: Base) -> None:
    zeros = jnp.zeros(shape, jnp.bfloat16)
    kept = stored(zeros, base)
    read = jax.jit(restore)(kept)
    assert (read.shape, read.dtype) == (shape, jnp.bfloat16)
    assert not np.any(as_float(read))
    abstract = stored(jax.ShapeDtypeStruct(shape, jnp.bfloat16), base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), kept)


def test_rows_too_short_for_a_scale_are_kept_as_bits() -> None:
    assert isinstance(stored(jnp.ones((2, 3, 6), jnp.bfloat16), "nf4"), Bits)
    assert isinstance(stored(jnp.ones((2, 3, 48), jnp.bfloat16), "nf4"), FourBits)
    assert isinstance(stored(jnp.ones((2, 3, 48), jnp.bfloat16), "int8"), EightBits)


@pytest.mark.parametrize("base", BASES)
def test_rows_of_a_table_are_rows_of_the_whole(base: Base) -> None:
    table = jax.random.normal(jax.random.key(0), (50, 64)).astype(jnp.bfloat16)
    rows = jnp.asarray([[3, 49], [0, 3]])
    kept = stored(table, base)
    np.testing.assert_array_equal(as_float(take_rows(kept, rows)), as_float(restore(kept)[rows]))  # type: ignore[arg-type, index]


def test_matrices_of_layers_and_the_table_are_stored_and_nothing_else() -> None:
    frozen = partition(small_model(), "all_but_lora")[1]
    kept = store(frozen, "int8")
    assert is_stored(kept.embedder.table)
    assert is_stored(kept.language.layers.gating.weight)
    assert is_stored(kept.action.layers.pre_ffw_norm.modulation.kernel)  # type: ignore[union-attr]
    assert is_stored(kept.vision.layers.mlp.up.kernel)
    assert isinstance(frozen.language.layers.pre_ffw_norm, RMSNorm)
    for part in (kept.language.layers.pre_ffw_norm, kept.vision.layers.norm1, kept.vision.patch, kept.language.final_norm):
        assert not any(map(is_stored, jax.tree.leaves(part, is_leaf=is_stored)))


@cache
def parts(mode: Freeze) -> tuple[Pi0Fuse, Pi0Fuse]:
    """With adapters that do something: a fresh one has B = 0."""
    trainable, frozen = partition(small_model(), mode)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), trainable), frozen


def loss_and_gradient(trainable: Pi0Fuse, frozen: Pi0Fuse, remat: Remat) -> tuple[jax.Array, Pi0Fuse]:
    batch = jax.tree.map(jnp.asarray, random_batch(0))

    def loss(trainable: Pi0Fuse) -> jax.Array:
        model = eqx.combine(trainable, frozen)
        model = dataclasses.replace(model, config=dataclasses.replace(MODEL, remat=remat))
        losses = sample_losses(model, batch, FLOW)
        return jnp.mean(losses.text + losses.action)

    value, gradient = jax.jit(jax.value_and_grad(loss))(trainable)
    return value, gradient


FLOW = draw_flow(jax.random.key(2), jnp.asarray(random_batch(0).actions), 2)


@pytest.mark.parametrize(
    ("mode", "base", "remat"),
    [
        ("llm", "bf16", "full"),
        pytest.param("llm", "nf4", "dots", marks=pytest.mark.slow),
        ("all_but_lora", "int8", "full"),
        pytest.param("llm", "int8", "none", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_stored_weights_is_a_step_on_what_they_are_read_as(mode: Freeze, base: Base, remat: Remat) -> None:
    """Whatever the backward pass keeps; the twin computes the whole last layer, and keeps everything."""
    trainable, frozen = parts(mode)
    kept = store(frozen, base)
    value, gradient = loss_and_gradient(trainable, kept, remat)
    expected, twin = loss_and_gradient(trainable, restore(kept), "none")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(twin), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(theirs))) + 1e-9)


def test_the_last_layer_makes_what_is_read_only() -> None:
    """Equal to the last rows of everything: keys and values are those of all tokens still."""
    trainable, frozen = parts("llm")
    model = eqx.combine(trainable, store(frozen, "bf16"))
    first = jax.random.normal(jax.random.key(0), (2, 7, 16))
    second, cond = jax.random.normal(jax.random.key(1), (2, 3, 8)), jax.random.normal(jax.random.key(2), (2, 1, 8))
    mask, positions = jnp.ones((2, 10, 10), bool), jnp.broadcast_to(jnp.arange(10), (2, 10))

    @partial(jax.jit, static_argnums=1)
    def run(model: Pi0Fuse, read: int | None) -> tuple[Array, ...]:
        streams, experts = (Stream(first), Stream(second, cond)), (model.language, model.action)
        return transformer(experts, streams, mask, positions, implementation="plain", read=read)[0]

    every, some = run(model, None), run(model, 2)
    np.testing.assert_allclose(some[0], every[0][:, -2:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some[1], every[1], rtol=1e-5, atol=1e-5)
    assert some[0].shape == (2, 2, 16)


def test_full_recomputation_keeps_bfloat16_as_bits_and_gives_the_same_gradient() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w.astype(x.dtype)) * x

    x, w = jax.random.normal(jax.random.key(0), (4, 8)).astype(jnp.bfloat16), jax.random.normal(jax.random.key(1), (8, 8))
    ours, pull = jax.vjp(checkpointed(function, "full"), x, w)
    theirs, plain = jax.vjp(jax.checkpoint(function), x, w)
    np.testing.assert_array_equal(as_float(ours), as_float(theirs))
    for found, expected in zip(pull(ours), plain(theirs), strict=True):
        np.testing.assert_array_equal(as_float(found), as_float(expected))
    kept = [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert kept == [jnp.uint16]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_no_second_copy_of_the_weights_is_kept(remat: Remat) -> None:
    """Compiled memory: int8 layers read as bfloat16 would be twice, as float32 four times their bytes."""
    depth, width = 16, 256
    codes = stored(jax.ShapeDtypeStruct((depth, width, width), jnp.bfloat16), "int8")

    def loss(x: jax.Array, codes: EightBits) -> jax.Array:
        block = checkpointed(use, remat)
        return jnp.sum(jax.lax.scan(lambda x, layer: (block(x, layer), None), x, codes)[0])

    def use(x: jax.Array, layer: EightBits) -> jax.Array:
        return jnp.tanh(x @ restore(layer).astype(x.dtype))  # type: ignore[attr-defined]

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((2, width), jnp.float32), codes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < depth * width * width
