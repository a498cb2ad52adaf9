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
from fusevla.model.storage import restore, stored
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


def check_head(chunk, wanted, weights):
    """Values, hits and both gradients against loops."""
    hidden, tokens = HIDDEN.reshape(18, 8), TOKENS.reshape(18)
    (_, (nll, hit)), gradients = weighted_nll(TABLE.table, hidden, tokens, wanted, weights, chunk)
    expected = references.token_nll(*map(np.asarray, (TABLE.table, hidden, tokens, wanted, weights)))
    for ours, other in zip((nll, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hit, wanted & (np.asarray(hidden @ TABLE.table.T).argmax(axis=1) == np.asarray(tokens)))


@partial(jax.jit, static_argnums=5)
@partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def weighted_nll(table, hidden, tokens, wanted, weights, chunk):
    nll, hit = token_nll(Embedder(table), hidden, tokens, wanted, chunk)
    return jnp.sum(nll * weights), (nll, hit)


@pytest.mark.parametrize("chunk", [1, 4, 7, 18, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_no_target_is_dropped_whatever_the_chunk(chunk, share):
    check_head(chunk, np.random.default_rng(1).random(18) < share, np.ones(18, np.float32))


counts = st.sampled_from([0, 1, 3, 4, 5, 8, 9, 18]) | st.integers(0, 18)
"""Of 18 positions by chunks of 4: none, one, at and about the edge of a chunk, all."""
weightings = st.lists(st.floats(-4, 4, width=16), min_size=18, max_size=18)


@given(counts, st.permutations(range(18)), weightings)
def test_the_head_and_its_gradients_for_any_count_of_targets(count, order, weights):
    check_head(4, np.isin(np.arange(18), order[:count]), np.array(weights, np.float32))


@pytest.mark.parametrize(("words", "chunk"), [(1, 5), (7, 6), (10, 8), (49, 9)])
def test_the_table_may_be_read_in_parts(words, chunk, monkeypatch):
    """Fifty parts, ten, five and two (each with a chunk of its own, or the program of another test would be taken)."""
    monkeypatch.setattr("fusevla.losses.WORDS", words)
    check_head(chunk, np.random.default_rng(2).random(18) < 0.6, RNG.normal(size=18).astype(np.float32))


@pytest.mark.parametrize("base", ["bf16", "int8", "nf4"])
def test_a_stored_table_is_what_it_is_read_as(base, monkeypatch):
    """In several parts; it has no gradient."""
    monkeypatch.setattr("fusevla.losses.WORDS", 10)
    table = stored(jnp.asarray(RNG.normal(size=(50, 32)), jnp.bfloat16), base)
    hidden, tokens, wanted = jnp.asarray(RNG.normal(size=(18, 32)), jnp.float32), TOKENS.reshape(18), np.arange(18) % 3 > 0

    def nll(hidden, table):
        holder = eqx.tree_at(lambda e: e.table, Embedder(jnp.zeros((50, 32))), table)
        return jnp.sum(token_nll(holder, hidden, tokens, wanted, 4)[0] * jnp.arange(18.0))

    ours, twin = (jax.jit(jax.value_and_grad(nll))(hidden, form) for form in (table, restore(table)))
    for found, expected in zip(ours, twin, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("trains", [False, True])
def test_the_head_holds_a_chunk_of_logits_and_never_copies_of_the_table(dtype, kept, trains):
    """Compiled memory of the gradient: no table for each chunk, no float32 copy, nothing of the table's size if frozen."""
    vocab, width, positions, chunk = 4096, 256, 64, 8
    shapes = (((vocab, width), kept), ((positions, width), dtype), ((positions,), "int32"), ((positions,), "bool"))

    def loss(table, hidden, tokens, wanted):
        return jnp.sum(token_nll(Embedder(table), hidden, tokens, wanted, chunk)[0])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if trains else 1))
    memory = gradient.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile().memory_analysis()
    logits, table = chunk * vocab * 4, vocab * width * 4
    cast = table // 2 if dtype != kept else 0
    of_the_table = table + (table if dtype == "bfloat16" else 0) if trains else 0  # the sum, and its cast
    assert memory.temp_size_in_bytes < 3 * logits + cast + of_the_table < positions * vocab * 4 + cast + of_the_table


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
