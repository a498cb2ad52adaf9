"""The step: what changes, what must not, and that donation and sharding leave the numbers alone."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusevla.arrays import Batch
from fusevla.presets import Freeze, TrainConfig
from fusevla.train.freeze import partition, trainable_spec
from fusevla.train.optim import make_optimizer
from fusevla.train.request import RequestError
from fusevla.train.sharding import check_batch_size, put_batch
from fusevla.train.state import evaluation_leaves, init_state
from fusevla.train.step import augment_batch, train_step
from tests.train.synthetic import MESH, TRAIN, compiled, fresh, random_batch, run, small_model

FULL = dataclasses.replace(TRAIN, freeze="none", ema_decay=0.5)
jitted = functools.cache(lambda config: jax.jit(functools.partial(train_step, config=config)))
three_steps = functools.cache(lambda config: run(config, [random_batch(0)] * 3))


@pytest.mark.parametrize("config", [TRAIN, FULL], ids=["llm", "none"])
def test_exactly_the_trainable_leaves_change(config) -> None:
    state, frozen, _ = three_steps(config)
    trainable, frozen_before = partition(small_model(), config.freeze)
    for before, after in zip(jax.tree.leaves(frozen_before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(np.asarray(before).view(np.uint16), np.asarray(after).view(np.uint16))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trainable, state.trainable)
    # A softmax does not feel a shift that is common to all keys: SigLIP's key bias has no gradient but rounding.
    changed = eqx.tree_at(lambda m: m.vision.layers.attn.key.bias, changed, True)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("freeze", ["llm", "all_but_lora", "none"])
def test_optimizer_state_is_for_trainable_leaves_only(freeze: Freeze) -> None:
    config = dataclasses.replace(TRAIN, freeze=freeze)
    trainable, _ = partition(small_model(), freeze)
    state = jax.eval_shape(lambda t: init_state(t, make_optimizer(config), jax.random.key(0)), trainable)
    count = sum(jax.tree.leaves(trainable_spec(small_model(), freeze)))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(jax.tree.leaves(state.trainable)) == count
    assert len(moments) == 2 * count
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


def test_losses_fall_and_metrics_are_complete() -> None:
    _, _, metrics = three_steps(TRAIN)
    assert metrics[2]["loss"] < metrics[0]["loss"]
    assert {"loss", "text_loss", "action_loss", "grad_norm", "learning_rate"} <= set(metrics[0])
    assert float(metrics[1]["learning_rate"]) == pytest.approx(TRAIN.schedule.peak)


def test_the_same_run_twice_is_bit_equal() -> None:
    assert three_steps(TRAIN)[2] == run(TRAIN, [random_batch(0)] * 3)[2]


def test_other_lengths_than_the_compiled_are_refused() -> None:
    state, frozen = fresh(TRAIN)
    with pytest.raises(ValueError, match=r"one of the compiled buckets \[12\], got 16"):
        compiled(TRAIN)(state, frozen, random_batch(0, length=16))


def test_the_state_is_donated() -> None:
    state, frozen = fresh(TRAIN)
    compiled(TRAIN)(state, frozen, put_batch(random_batch(0), MESH))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_average_follows_the_weights() -> None:
    state, _, _ = run(FULL, [random_batch(0)])
    before = jax.tree.leaves(partition(small_model(), "none")[0])
    leaves = zip(before, jax.tree.leaves(state.trainable), jax.tree.leaves(evaluation_leaves(state)), strict=True)
    for old, new, average in leaves:
        np.testing.assert_allclose(average, 0.5 * old + 0.5 * new, rtol=1e-5, atol=1e-7)


def test_augmentation_draws_by_key_and_can_be_off() -> None:
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    keys = jax.random.split(jax.random.key(0))
    augmented = jax.jit(lambda key: augment_batch(batch, key, TRAIN.augment).observation.images["base_0_rgb"])
    images = [augmented(key) for key in keys]
    assert images[0].dtype == jnp.float32
    assert (images[0] != images[1]).any()
    plain = augment_batch(batch, keys[0], None).observation.images["base_0_rgb"]
    np.testing.assert_allclose(plain, batch.observation.images["base_0_rgb"].astype(jnp.float32) / 127.5 - 1, atol=1e-6)


def test_uneven_batches_are_refused() -> None:
    with pytest.raises(RequestError, match="4 samples cannot be shared evenly by 3 devices"):
        check_batch_size(4, 3)
    check_batch_size(24, 3, 4)
    with pytest.raises(
        RequestError,
        match="8 samples of each of 3 devices cannot be divided into 5 equal parts; take a batch that is a multiple of 15",
    ):
        check_batch_size(24, 3, 5)


EIGHT = dataclasses.replace(TRAIN, batch_size=8, flow_draws=2)


def uneven_batch(parts: int):
    """Of its samples every ``parts``-th reasons, so that all but the first part have none that does; the others act or rest."""
    batch, index = random_batch(0, size=8), np.arange(8)
    reasons = index % parts == 0
    batch = eqx.tree_at(lambda b: b.diffusion_loss_mask, batch, (index % 3 == 1) | (index % 4 == 2))
    wanted = np.broadcast_to((np.arange(12) >= 6) & (np.arange(12) < 10 - index[:, None] % 3), (8, 12))
    return eqx.tree_at(lambda b: b.token_loss_mask, batch, wanted & reasons[:, None])


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_parts_of_a_batch_do_what_the_whole_does(parts: int) -> None:
    """Same draws, same gradient (AdamW's first moment after a step is a tenth of it), same metrics, same weights."""
    batch = uneven_batch(parts)
    (whole, of_whole), (divided, of_divided) = (
        one_step(EIGHT, batch),
        one_step(dataclasses.replace(EIGHT, accumulate=parts), batch),
    )
    assert {"text_loss", "action_loss", "token_accuracy", "text_share", "action_share", "grad_norm"} <= set(of_whole)
    assert of_whole["text_share"] == 1 / parts
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_divided[name], value, rtol=1e-5, err_msg=name)
    moments = [optax.tree.get(state.opt_state, "mu") for state in (whole, divided)]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moments[0]))
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(float(jnp.abs(a).max()), 1e-3 * scale))
    sure = jax.tree.map(lambda m: jnp.abs(m) > 1e-3 * scale, moments[0])  # Adam's first step is the sign of the gradient
    for a, b, known in zip(*map(jax.tree.leaves, (whole.trainable, divided.trainable, sure)), strict=True):
        np.testing.assert_allclose(b[known], a[known], rtol=1e-5, atol=1e-6)


def one_step(config: TrainConfig, batch: Batch):
    state, metrics = jitted(config)(*fresh(config), jax.tree.map(jnp.asarray, batch))
    return state, jax.device_get(metrics)


TWO_DEVICES = """
import dataclasses, json, jax
from fusevla.train.sharding import make_mesh, put_batch
from fusevla.train.step import CompiledSteps, divide
from tests.train.synthetic import TRAIN, fresh, random_batch
config = dataclasses.replace(TRAIN, accumulate=2)
mesh = make_mesh()
state, frozen = fresh(config, mesh)
steps = CompiledSteps(config, mesh)
steps.compile(state, frozen, random_batch(0), [12])
program = jax.jit(lambda batch: divide(batch, 2)).lower(put_batch(random_batch(0), mesh)).compile().as_text()
assert not any(moves in program for moves in ("all-to-all", "all-gather", "collective-permute"))
rows = []
for _ in range(3):
    batch = put_batch(random_batch(0), mesh)
    assert len(batch.actions.sharding.device_set) == 2 and not batch.actions.is_fully_replicated
    state, metrics = steps(state, frozen, batch)
    rows.append({name: float(value) for name, value in metrics.items()})
assert all(len(leaf.sharding.device_set) == 2 and leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
print(json.dumps(rows))
"""


def test_two_devices_give_the_losses_of_one() -> None:
    """In two parts as well; to divide the batch moves no sample from one device to the other."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected, got in zip(three_steps(TRAIN)[2], json.loads(done.stdout), strict=True):
        for name in expected:
            assert got[name] == pytest.approx(float(expected[name]), rel=2e-3), name
