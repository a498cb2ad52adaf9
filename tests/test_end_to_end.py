"""The whole way once, in the order of the data: preset, samples, batch, forward, gradients, three steps, a thought, actions."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.arrays import Batch
from fusevla.data.annotations import load_annotations
from fusevla.data.batch import collate
from fusevla.data.lerobot import open_set
from fusevla.data.normalize import compute_norm_stats
from fusevla.data.samples import SampleSource
from fusevla.losses import joint_loss, sample_losses
from fusevla.model.fuse import Pi0Fuse, abstract, init
from fusevla.model.openpi_names import leaves_by_name
from fusevla.policy.sampling import act, prefill, reason
from fusevla.presets import LIBERO10, TINY, Preset
from fusevla.tokens.tokenizer import train_tokenizer
from fusevla.train.freeze import partition
from fusevla.train.optim import make_optimizer
from fusevla.train.state import init_state
from fusevla.train.step import train_step
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def real(libero_sample) -> tuple[Preset, SampleSource, Batch]:
    """The libero10 preset at tiny sizes on real frames: (preset, sample source, one batch of 4)."""
    frames, annotations = open_set(libero_sample), load_annotations(libero_sample / "cot_simple.json")
    texts = [segment.content for episode in annotations.episodes.values() for segment in episode.segments]
    tokenizer = train_tokenizer(texts, vocab_size=700)
    model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    preset = dataclasses.replace(LIBERO10, model=model)
    stats = compute_norm_stats(frames)
    source = SampleSource(frames, annotations, tokenizer, stats, preset.data, preset.model)
    samples = [source(index, 0, 0) for index in (3, 30, 150, 700)]
    return preset, source, collate(samples, preset.data.text_buckets)


def test_a_real_batch_has_everything_the_model_reads(real):
    preset, source, batch = real
    observation, size = batch.observation, preset.model.vision.image_size
    assert sorted(observation.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert all(image.shape == (4, size, size, 3) and image.dtype == np.uint8 for image in observation.images.values())
    assert all(image.std() > 10 for image in observation.images.values())
    assert all(mask.all() for mask in observation.image_masks.values())
    assert observation.tokens.shape[1] in preset.data.text_buckets
    assert observation.state.shape == (4, preset.model.action_dim)
    assert batch.actions.shape == (4, preset.model.action_horizon, preset.model.action_dim)
    assert np.abs(batch.actions[..., :7]).max() > 0.1
    assert not batch.actions[..., 7:].any()
    # a suffix for every sample; a target wherever the sample reasons or decides to act
    assert (observation.token_ar_mask & observation.token_mask).any(axis=1).all()
    text = source.tokenizer.decode([int(t) for t in observation.tokens[0][observation.token_mask[0]]])
    assert text.startswith("Instruction: pick up the alphabet soup")


@pytest.fixture(scope="module")
def model(real) -> Pi0Fuse:
    """Random on every leaf: zero-initialised ones would hide gradients."""
    return tiny_model(real[0].model)


def test_the_forward_pass_uses_every_field_of_the_observation(real, model):
    """Changing a field changes a loss. The state is the exception: pi0.5 reads it from the prompt's text."""
    _, _, batch = real
    batch = jax.tree.map(jnp.asarray, batch)
    flow = partial(joint_loss, key=jax.random.key(0))
    loss = jax.jit(lambda b: flow(model, b)[0])
    usual = loss(batch)
    assert np.isfinite(usual)
    changes = {
        "base image": lambda b: b.observation.images["base_0_rgb"],
        "wrist image": lambda b: b.observation.images["left_wrist_0_rgb"],
        "base mask": lambda b: b.observation.image_masks["base_0_rgb"],
        "wrist mask": lambda b: b.observation.image_masks["left_wrist_0_rgb"],
        "tokens": lambda b: b.observation.tokens,
        "token mask": lambda b: b.observation.token_mask,
        "ar mask": lambda b: b.observation.token_ar_mask,
        "loss mask": lambda b: b.token_loss_mask,
        "diffusion mask": lambda b: b.diffusion_loss_mask,
        "actions": lambda b: b.actions,
        "action padding": lambda b: b.action_is_pad,
    }
    flip = lambda leaf: ~leaf if leaf.dtype == bool else leaf + jnp.ones((), leaf.dtype)
    for name, pick in changes.items():
        assert loss(eqx.tree_at(pick, batch, replace_fn=flip)) != usual, f"{name} is lost on the way"


def test_gradients_are_where_they_should_be_and_nowhere_else(real, model):
    """Exactly the trainable leaves have one, none of it zero; frozen leaves are not in the tree at all."""
    preset, _, batch = real
    trainable, frozen = partition(model, "llm")
    grads = jax.jit(jax.grad(lambda t: joint_loss(eqx.combine(t, frozen), batch, jax.random.key(0))[0]))(trainable)
    gradient, rest = leaves_by_name(grads), leaves_by_name(frozen)
    assert set(gradient) | set(rest) == set(leaves_by_name(abstract(preset.model)))
    assert not set(gradient) & set(rest)
    assert {name.split(".")[0] for name in rest} == {"embedder", "language", "action"}
    for name, value in gradient.items():
        flat = np.abs(np.asarray(value)).max()
        if name == "vision.layers.attn.key.bias":  # shifts all logits of a query alike: softmax cancels it
            assert flat < 1e-6
        else:
            assert flat > 0, f"{name} gets no gradient"


def test_three_steps_lower_the_loss_and_leave_the_frozen_bits_alone(real, model):
    preset, _, batch = real
    train = dataclasses.replace(
        preset.train, steps=3, augment=None, schedule=dataclasses.replace(preset.train.schedule, peak=3e-3, warmup_steps=0)
    )
    trainable, frozen = partition(model, "llm")
    before = jax.tree.map(np.asarray, frozen)
    state = init_state(trainable, make_optimizer(train), jax.random.key(0))
    step = jax.jit(partial(train_step, config=train))
    losses = []
    for _ in range(4):  # the same noise every time, so that falling means learning
        state, metrics = step(eqx.tree_at(lambda s: s.step, state, jnp.int32(0)), frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2] > losses[3]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_result_reasons_and_acts(real, model):
    """A thought from every sample (whatever it says), then a chunk of actions, from one prefill."""
    preset, source, batch = real
    state = jax.jit(prefill, static_argnums=2)(model, batch.observation, 9)
    thought, _ = jax.jit(reason, static_argnums=2)(model, state, 8)
    assert thought.tokens.shape == (4, 8)
    assert all(isinstance(source.tokenizer.decode([int(t) for t in row]), str) for row in thought.tokens)
    noise = jax.random.normal(jax.random.key(0), (4, 2, preset.model.action_horizon, preset.model.action_dim))
    chunk = jax.jit(act, static_argnums=3)(model, state, noise, 3)
    assert chunk.shape == noise.shape
    assert np.isfinite(chunk).all()


def test_a_fresh_model_of_the_preset_trains_from_step_zero(real):
    """Adapters start at zero: the first losses are the base model's, finite and near chance for text."""
    preset, _, batch = real
    fresh = init(preset.model, jax.random.key(0))
    from fusevla.losses import draw_flow

    parts = jax.jit(sample_losses)(fresh, batch, draw_flow(jax.random.key(1), jnp.asarray(batch.actions)))
    has_text = np.asarray(batch.token_loss_mask).any(axis=1)
    chance = np.log(preset.model.vocab_size)
    assert (np.abs(np.asarray(parts.text)[has_text] - chance) < 0.5 * chance).all()
