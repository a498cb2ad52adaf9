"""The step: what changes, what must not, and that compiling ahead, sharding and donation leave the numbers alone."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.arrays import Batch
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import Freeze, TrainConfig
from fusevla.train.freeze import partition, trainable_spec
from fusevla.train.optim import make_optimizer
from fusevla.train.sharding import check_batch_size, make_mesh, put_batch, replicate
from fusevla.train.state import TrainState, evaluation_leaves, init_state
from fusevla.train.step import CompiledSteps, Metrics, augment_batch, train_step
from tests.train.synthetic import TRAIN, random_batch, small_model


def fresh(config: TrainConfig, devices: int = 1) -> tuple[TrainState, Pi0Fuse, CompiledSteps]:
    mesh = make_mesh(jax.devices()[:devices])
    trainable, frozen = partition(jax.tree.map(jnp.copy, small_model()), config.freeze)
    state = init_state(trainable, make_optimizer(config), jax.random.key(config.seed), ema=config.ema_decay is not None)
    return replicate(state, mesh), replicate(frozen, mesh), CompiledSteps(config, mesh)


def run(config: TrainConfig, batches: list[Batch], devices: int = 1) -> tuple[TrainState, Pi0Fuse, list[Metrics]]:
    mesh = make_mesh(jax.devices()[:devices])
    state, frozen, steps = fresh(config, devices)
    steps.compile(state, frozen, batches[0], sorted({batch.observation.tokens.shape[1] for batch in batches}))
    metrics = []
    for batch in batches:
        state, values = steps(state, frozen, put_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return state, frozen, metrics


@functools.cache
def three_steps(freeze: Freeze) -> tuple[TrainState, Pi0Fuse, list[Metrics]]:
    return run(dataclasses.replace(TRAIN, freeze=freeze), [random_batch(0)] * 3)


@pytest.mark.parametrize("freeze", ["llm", "all_but_lora", "none"])
def test_exactly_the_trainable_leaves_change(freeze: Freeze) -> None:
    state, frozen, _ = three_steps(freeze)
    trainable, frozen_before = partition(small_model(), freeze)
    for before, after in zip(jax.tree.leaves(frozen_before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(np.asarray(before).view(np.uint16), np.asarray(after).view(np.uint16))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trainable, state.trainable)
    # A softmax does not feel a shift that is common to all keys: SigLIP's key bias has no gradient.
    changed = eqx.tree_at(lambda m: m.vision.layers.attn.key.bias, changed, True) if freeze != "all_but_lora" else changed
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("freeze", ["llm", "all_but_lora", "none"])
def test_optimizer_state_is_for_trainable_leaves_only(freeze: Freeze) -> None:
    state, _, _ = three_steps(freeze)
    count = sum(jax.tree.leaves(trainable_spec(small_model(), freeze)))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(jax.tree.leaves(state.trainable)) == count
    assert len(moments) == 2 * count
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


def test_losses_fall_and_metrics_are_complete() -> None:
    _, _, metrics = three_steps("llm")
    assert metrics[2]["loss"] < metrics[0]["loss"]
    assert {"loss", "text_loss", "action_loss", "grad_norm", "learning_rate"} <= set(metrics[0])
    assert float(metrics[1]["learning_rate"]) == pytest.approx(TRAIN.schedule.peak)


def test_the_same_run_twice_is_bit_equal() -> None:
    first, second = three_steps("llm"), run(TRAIN, [random_batch(0)] * 3)
    assert first[2] == second[2]


def test_compiled_ahead_equals_plain_and_other_lengths_are_refused() -> None:
    config = dataclasses.replace(TRAIN, augment=None)
    batches = [random_batch(1, length=12), random_batch(2, length=16)]
    state, frozen, metrics = run(config, batches)
    plain, _, _ = fresh(config)
    once = jax.jit(functools.partial(train_step, config=config))
    for batch, expected in zip(batches, metrics, strict=True):
        plain, got = once(plain, frozen, jax.tree.map(jnp.asarray, batch))
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)
    assert int(state.step) == 2
    steps = CompiledSteps(config, make_mesh(jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"one of the compiled buckets \[\], got 12"):
        steps(plain, frozen, batches[0])


def test_the_state_is_donated() -> None:
    state, frozen, steps = fresh(TRAIN)
    batch = random_batch(0)
    steps.compile(state, frozen, batch, [12])
    steps(state, frozen, put_batch(batch, make_mesh(jax.devices()[:1])))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_average_follows_the_weights() -> None:
    config = dataclasses.replace(TRAIN, freeze="none", ema_decay=0.5)
    state, _, _ = run(config, [random_batch(0)])
    before = jax.tree.leaves(partition(small_model(), "none")[0])
    leaves = zip(before, jax.tree.leaves(state.trainable), jax.tree.leaves(evaluation_leaves(state)), strict=True)
    for old, new, average in leaves:
        np.testing.assert_allclose(average, 0.5 * old + 0.5 * new, rtol=1e-5, atol=1e-7)


def test_augmentation_draws_by_step_and_can_be_off() -> None:
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    keys = jax.random.split(jax.random.key(0))
    images = [augment_batch(batch, key, TRAIN.augment).observation.images["base_0_rgb"] for key in keys]
    assert images[0].dtype == jnp.float32
    assert (images[0] != images[1]).any()
    plain = augment_batch(batch, keys[0], None).observation.images["base_0_rgb"]
    np.testing.assert_allclose(plain, batch.observation.images["base_0_rgb"].astype(jnp.float32) / 127.5 - 1, atol=1e-6)


def test_uneven_batches_are_refused() -> None:
    class ThreeDevices:
        size = 3

    with pytest.raises(ValueError, match="4 samples cannot be shared evenly by 3 devices"):
        check_batch_size(4, ThreeDevices())  # type: ignore[arg-type]


SEVERAL = """
import jax, numpy as np
from tests.train.test_step import run
from tests.train.synthetic import TRAIN, random_batch
assert len(jax.devices()) == 2
batches = [random_batch(0), random_batch(1)]
alone, _, expected = run(TRAIN, batches, devices=1)
state, _, metrics = run(TRAIN, batches, devices=2)
for a, b in zip(expected, metrics):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
leaf = state.trainable.action_in_proj.kernel
assert len(leaf.sharding.device_set) == 2 and leaf.sharding.is_fully_replicated
print("equal")
"""


def test_two_devices_give_the_losses_of_one() -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SEVERAL], env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr
