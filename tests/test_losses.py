"""The losses against loops, and what must not depend on chunks, draws or padding."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.losses import (
    Flow,
    draw_flow,
    flow_matching_loss,
    joint_loss,
    noisy_actions,
    sample_losses,
    text_loss,
    token_nll,
)
from fusevla.model.layers import Embedder
from tests import references
from tests.tiny import tiny_batch, tiny_model

RNG = np.random.default_rng(0)
TABLE = Embedder(jnp.asarray(RNG.normal(size=(50, 8)).astype(np.float32)))
HIDDEN = jnp.asarray(RNG.normal(size=(3, 6, 8)).astype(np.float32))
TOKENS = jnp.asarray(RNG.integers(0, 50, (3, 6)).astype(np.int32))
targets = st.lists(st.booleans(), min_size=18, max_size=18).map(lambda bits: np.array(bits).reshape(3, 6))


@given(targets)
def test_text_loss_is_the_mean_over_each_samples_own_targets(mask):
    loss, correct, count = jax.jit(text_loss)(TABLE, HIDDEN, TOKENS, jnp.asarray(mask))
    logits = np.asarray(TABLE.unembed(HIDDEN))
    np.testing.assert_allclose(loss, references.text_loss(logits, np.asarray(TOKENS), mask), rtol=1e-5, atol=1e-6)
    hits = (logits[:, :-1].argmax(-1) == np.asarray(TOKENS)[:, 1:]) & mask[:, 1:]
    np.testing.assert_array_equal(correct, hits.sum(axis=1))
    np.testing.assert_array_equal(count, mask[:, 1:].sum(axis=1))


@pytest.mark.parametrize("chunk", [1, 4, 7, 18, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_no_target_is_dropped_whatever_the_chunk(chunk, share):
    hidden, tokens = HIDDEN.reshape(18, 8), TOKENS.reshape(18)
    wanted = jnp.asarray(np.random.default_rng(1).random(18) < share)

    def total(table, hidden):
        return jnp.sum(token_nll(Embedder(table), hidden, tokens, wanted, chunk)[0])

    def naive(table, hidden):
        logprobs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.sum(jnp.where(wanted, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], 0.0))

    for ours, expected in zip(
        jax.value_and_grad(total, argnums=(0, 1))(TABLE.table, hidden)[1],
        jax.value_and_grad(naive, argnums=(0, 1))(TABLE.table, hidden)[1],
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total(TABLE.table, hidden), naive(TABLE.table, hidden), rtol=1e-6)


def test_the_head_never_holds_more_than_a_chunk_of_logits():
    """Compiled memory of the loss and its gradient, far below all logits of all positions."""
    vocab, positions, chunk = 8192, 4096, 128
    table = Embedder(jnp.zeros((vocab, 16)))
    arguments = (jnp.zeros((positions, 16)), jnp.zeros(positions, jnp.int32), jnp.ones(positions, bool))

    def loss(hidden, tokens, wanted):
        return jnp.sum(token_nll(table, hidden, tokens, wanted, chunk)[0])

    memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 12 * chunk * vocab * 4 < positions * vocab * 4


def test_flow_matching():
    actions = jnp.asarray(RNG.normal(size=(2, 3, 4)).astype(np.float32))
    flow = Flow(jnp.asarray(RNG.normal(size=(2, 2, 3, 4)).astype(np.float32)), jnp.array([[0.0, 1.0], [0.5, 0.25]]))
    x, u = noisy_actions(flow, actions)
    np.testing.assert_allclose(x[0, 0], actions[0], atol=1e-6)
    np.testing.assert_allclose(x[0, 1], flow.noise[0, 1], atol=1e-6)
    np.testing.assert_allclose(x - flow.time[..., None, None] * u, jnp.broadcast_to(actions[:, None], x.shape), atol=1e-6)


def test_padded_steps_are_not_trained():
    """The mean is over real steps and all dimensions; a sample of padding only gives zero, not NaN."""
    predicted = jnp.asarray(RNG.normal(size=(3, 1, 4, 2)).astype(np.float32))
    target = jnp.zeros_like(predicted)
    pad = jnp.array([[False] * 4, [False, False, True, True], [True] * 4])
    loss = flow_matching_loss(predicted, target, pad)
    squares = np.square(np.asarray(predicted))[:, 0]
    np.testing.assert_allclose(loss, [squares[0].mean(), squares[1, :2].mean(), 0.0], rtol=1e-6)
    np.testing.assert_allclose(flow_matching_loss(predicted, target), squares.mean(axis=(1, 2)), rtol=1e-6)


def test_time_is_beta_on_its_interval():
    time = np.asarray(draw_flow(jax.random.key(0), jnp.zeros((4000, 1, 1))).time)
    assert time.min() >= 0.001
    assert time.max() <= 1.0
    assert abs(time.mean() - (0.6 * 0.999 + 0.001)) < 0.02  # mean of Beta(1.5, 1) is 0.6


def batch_of_two():
    valid = np.ones((2, 6), bool)
    ar = np.broadcast_to(np.arange(6) >= 3, (2, 6))
    batch = tiny_batch(valid, np.array(ar))
    return dataclasses.replace(batch, diffusion_loss_mask=jnp.array([False, True]))


def test_the_joint_loss_and_its_parts():
    model, batch, key = tiny_model(), batch_of_two(), jax.random.key(3)
    batch = eqx.tree_at(lambda b: b.token_loss_mask, batch, batch.token_loss_mask.at[1].set(False))
    loss, metrics = jax.jit(partial(joint_loss, coeff=0.5))(model, batch, key)
    parts = sample_losses(model, batch, draw_flow(key, batch.actions))
    assert parts.text[1] == 0
    assert parts.action[0] == 0
    np.testing.assert_allclose(loss, (parts.text[0] + 0.5 * parts.action[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["text_loss"], parts.text[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["action_loss"], parts.action[1], rtol=1e-5)
    assert metrics["text_share"] == metrics["action_share"] == 0.5


def test_several_draws_average_the_published_loss():
    model, batch, key = tiny_model(), batch_of_two(), jax.random.key(3)
    flow = draw_flow(key, batch.actions, 4)
    together = sample_losses(model, batch, flow)
    alone = [sample_losses(model, batch, Flow(flow.noise[:, i : i + 1], flow.time[:, i : i + 1])) for i in range(4)]
    np.testing.assert_allclose(together.action, np.mean([part.action for part in alone], axis=0), rtol=1e-5)
    np.testing.assert_allclose(together.text, alone[0].text, rtol=1e-5)
