"""The step that the benchmark calls the reference says what ours says: losses, gradients, and a whole step."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.evaluate.reference_step import MASKED_CAMERA, TEXT, reference_batch, reference_loss, reference_step
from fusevla.losses import joint_loss
from fusevla.presets import Freeze
from fusevla.train.freeze import partition
from fusevla.train.step import train_step
from tests.train.synthetic import TRAIN, fresh, random_batch, small_model

BATCH = random_batch(0)
BATCH.action_is_pad[1, -1] = True
WIDE = reference_batch(BATCH, 40)
"""Padded to less than 415 only so that the tests are quick."""


def test_the_reference_sees_a_masked_camera_more_and_text_of_415_tokens() -> None:
    full = reference_batch(BATCH)
    assert sorted(full.observation.images) == ["base_0_rgb", "left_wrist_0_rgb", MASKED_CAMERA]
    assert not full.observation.image_masks[MASKED_CAMERA].any()
    for wide, own in (
        (full.observation.tokens, BATCH.observation.tokens),
        (full.observation.token_mask, BATCH.observation.token_mask),
        (full.observation.token_ar_mask, BATCH.observation.token_ar_mask),
        (full.token_loss_mask, BATCH.token_loss_mask),
    ):
        assert wide.shape == (4, TEXT)
        np.testing.assert_array_equal(wide[:, : own.shape[1]], own)
        assert not wide[:, own.shape[1] :].any()


@pytest.mark.parametrize("freeze", ["llm", "all_but_lora"])
def test_loss_and_gradients_are_ours(freeze: Freeze) -> None:
    trainable, frozen = partition(small_model(), freeze)
    key = jax.random.key(7)

    def ours(trainable):
        return joint_loss(eqx.combine(trainable, frozen), jax.tree.map(jnp.asarray, BATCH), key, coeff=0.7)[0]

    def theirs(trainable):
        return reference_loss(eqx.combine(trainable, frozen), jax.tree.map(jnp.asarray, WIDE), key, coeff=0.7)

    loss, grads = jax.jit(jax.value_and_grad(ours))(trainable)
    expected, reference_grads = jax.jit(jax.value_and_grad(theirs))(trainable)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    scale = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(reference_grads))
    for path, got, want in zip(paths, jax.tree.leaves(grads), jax.tree.leaves(reference_grads), strict=True):
        # The gradient of SigLIP's key bias is zero but for rounding, so every leaf is also given a share of the largest.
        assert float(jnp.linalg.norm(got - want)) <= 1e-5 * float(jnp.linalg.norm(want)) + 1e-6 * scale, path


@pytest.mark.slow
def test_a_step_is_ours_augmentation_clip_and_optimizer_included() -> None:
    config = dataclasses.replace(TRAIN, clip_norm=0.1)
    state, frozen = fresh(config)
    assert config.augment is not None
    ours, metrics = jax.jit(partial(train_step, config=config))(state, frozen, BATCH)
    theirs, reference = jax.jit(partial(reference_step, config=config))(state, frozen, WIDE)
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(reference[name]), rel=1e-5)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    # Adam's first step is lr * sign(gradient) wherever the gradient exceeds eps: leaves of rounding alone say nothing.
    moments = zip(jax.tree.leaves(ours.opt_state), jax.tree.leaves(theirs.opt_state), strict=True)
    for got, want in moments:
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)
