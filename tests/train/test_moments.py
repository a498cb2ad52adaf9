"""Moments in fewer bits: what rounding costs, that only the tower's are concerned, and that training and resuming go on."""

import dataclasses
from pathlib import Path

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fusevla.model import fuse
from fusevla.presets import LIBERO10, Moments, ScheduleConfig
from fusevla.train import checkpoint as ckpt
from fusevla.train.freeze import partition
from fusevla.train.job import abstract_state
from fusevla.train.moments import BLOCK, Blocks, decode, encode_first, encode_second
from fusevla.train.optim import make_optimizer, make_schedule
from fusevla.train.sharding import replicated
from fusevla.train.state import init_state
from tests.train.synthetic import MESH, TRAIN, compiled, fresh, put_batch, random_batch, run, small_model
from tests.train.test_checkpoint import INFO, assert_same

SHAPE = (2, BLOCK - 6)
"""Two blocks, the second not full."""
first, second = (jax.jit(lambda x, e=encode: (e(x), decode(e(x)))) for encode in (encode_first, encode_second))
arrays = hnp.arrays(np.float32, SHAPE, elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))


def in_blocks(values: np.ndarray) -> np.ndarray:
    return np.pad(values.reshape(-1), (0, 2 * BLOCK - values.size)).reshape(2, BLOCK)


@hypothesis.given(arrays)
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_error_is_half_a_code_of_the_cube_root(values: np.ndarray) -> None:
    for (codes, back), top, root in (
        (first(values), 127, np.cbrt(values)),
        (second(np.square(values)), 255, np.cbrt(np.abs(values))),
    ):
        got = np.cbrt(back if top == 127 else np.sqrt(back))
        largest = np.abs(in_blocks(root)).max(axis=1, keepdims=True)
        # one code, not a half, where a small second moment was kept from becoming zero
        room = np.where((top == 255) & (in_blocks(got) <= 1.01 * largest / top), 1.0, 0.501) / top
        assert (np.abs(in_blocks(got) - in_blocks(root)) <= room * largest + 1e-12).all()
        assert codes.codes.shape == SHAPE
        assert codes.scale.shape == (2,)


@hypothesis.given(arrays)
@hypothesis.settings(max_examples=25, deadline=None)
def test_what_is_not_zero_is_divided_by_something(values: np.ndarray) -> None:
    squares = np.square(values)
    squares[squares < np.finfo(np.float32).tiny] = 0  # XLA takes what is smaller for zero
    codes, back = second(squares)
    np.testing.assert_array_equal(codes.codes == 0, squares == 0)
    np.testing.assert_array_equal(back[squares == 0], 0)


def test_zeros_stay_zero_and_the_largest_stays_itself() -> None:
    values = np.zeros(SHAPE, np.float32)
    np.testing.assert_array_equal(first(values)[1], values)
    np.testing.assert_array_equal(second(values)[1], values)
    values[0, 3], values[1, -1] = -7e5, 3e-6
    np.testing.assert_allclose(first(values)[1], values, rtol=1e-6)
    np.testing.assert_allclose(second(np.abs(values))[1], np.abs(values), rtol=1e-6)


def test_an_outlier_spoils_its_own_block_only() -> None:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    spoiled = values.copy()
    spoiled[0, 0] = 1e8
    other = (np.arange(values.size) >= BLOCK).reshape(SHAPE)
    np.testing.assert_array_equal(first(spoiled)[1][other], first(values)[1][other])
    np.testing.assert_allclose(first(spoiled)[1][0, 0], 1e8, rtol=1e-6)


def test_codes_come_back_from_what_they_stand_for() -> None:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    codes, back = first(values)
    assert_same(first(back)[0], codes)
    codes, back = second(np.square(values))
    np.testing.assert_array_equal(second(back)[0].codes, codes.codes)


def optimizer_state(moments: Moments, freeze="llm"):
    config = dataclasses.replace(TRAIN, moments=moments, freeze=freeze)
    trainable, _ = partition(small_model(), freeze)
    return trainable, init_state(trainable, make_optimizer(config), jax.random.key(0)).opt_state


def test_float32_is_adamw_of_optax_to_the_bit() -> None:
    trainable, state = optimizer_state("float32")
    adamw = optax.adamw(lambda step: make_schedule(TRAIN.schedule)(step), b2=TRAIN.b2, weight_decay=TRAIN.weight_decay)
    plain = optax.chain(optax.clip_by_global_norm(TRAIN.clip_norm), adamw)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(trainable))
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(plain.update)(trainable, state, trainable)
    assert_same(jax.jit(make_optimizer(TRAIN).update)(trainable, state, trainable), expected)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_only_the_tower_is_kept_in_fewer_bits(moments: Moments) -> None:
    trainable, state = optimizer_state(moments)
    adam = state[1][0]
    for moment, code in ((adam.mu, jnp.int8), (adam.nu, jnp.uint8)):
        rest = jax.tree.leaves(eqx.tree_at(lambda m: m.vision, moment, None))
        assert {leaf.dtype for leaf in rest} == {jnp.dtype(jnp.float32)}
        is_blocks = lambda node: isinstance(node, Blocks)
        tower = jax.tree.leaves(moment.vision, is_leaf=is_blocks)
        for kept, leaf in zip(tower, jax.tree.leaves(trainable.vision), strict=True):
            assert is_blocks(kept) == (moments == "int8")
            array = kept.codes if is_blocks(kept) else kept
            assert (array.shape, array.dtype) == (leaf.shape, code if moments == "int8" else jnp.bfloat16)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_frozen_tower_changes_nothing(moments: Moments) -> None:
    trainable, state = optimizer_state(moments, "all_but_lora")
    _, plain = optimizer_state("float32", "all_but_lora")
    assert_same(state, plain)
    config = dataclasses.replace(TRAIN, freeze="all_but_lora")
    updates = [
        jax.jit(make_optimizer(dataclasses.replace(config, moments=kind)).update)(trainable, state, trainable)
        for kind in ("float32", moments)
    ]
    assert_same(updates[1], updates[0])


def test_bytes_at_full_size() -> None:
    size = {}
    for moments in ("float32", "bfloat16", "int8"):
        preset = dataclasses.replace(LIBERO10, train=dataclasses.replace(LIBERO10.train, moments=moments))
        size[moments] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(preset).opt_state))
    tower = sum(leaf.size for leaf in jax.tree.leaves(fuse.abstract(LIBERO10.model).vision))
    assert size["float32"] - size["bfloat16"] == 4 * tower
    assert 5.96 * tower < size["float32"] - size["int8"] < 6 * tower  # a scale for 256 is 1/64 of a byte, twice


LONG = dataclasses.replace(TRAIN, schedule=ScheduleConfig(peak=3e-3, end=3e-4, warmup_steps=2, decay_steps=12))


@pytest.mark.parametrize(("moments", "apart"), [pytest.param("bfloat16", 0.01, marks=pytest.mark.slow), ("int8", 0.05)])
def test_training_follows_that_in_float32(moments: Moments, apart: float) -> None:
    """Twelve steps: the way that the tower's weights go, and the loss; a moment that is lost or explodes goes elsewhere."""
    batches = [random_batch(i % 2) for i in range(12)]
    start = fresh(LONG)[0].trainable.vision
    plain, _, losses = run(LONG, batches)
    other, _, others = run(dataclasses.replace(LONG, moments=moments), batches)
    way = [ravel_pytree(jax.tree.map(jnp.subtract, s.trainable.vision, start))[0] for s in (plain, other)]
    assert 0 < jnp.linalg.norm(way[1] - way[0]) < apart * jnp.linalg.norm(way[0])
    np.testing.assert_allclose([m["loss"] for m in others], [m["loss"] for m in losses], rtol=1e-3)
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize("moments", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(moments: Moments, tmp_path: Path) -> None:
    config = dataclasses.replace(LONG, moments=moments)
    batches = [random_batch(i) for i in range(4)]
    expected, _, _ = run(config, batches)
    state, frozen, _ = run(config, batches[:2])
    writer = ckpt.Checkpoints(tmp_path, 1, INFO)
    writer.save(2, state)
    writer.close()
    like = jax.eval_shape(lambda: fresh(config)[0])
    state = ckpt.restore_state(tmp_path, like, replicated(MESH))
    for batch in batches[2:]:
        state, _ = compiled(config)(state, frozen, put_batch(batch, MESH))
    assert_same(state, expected)
