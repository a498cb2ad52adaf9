"""Decoding and acting on a tiny model: what each sample gives in a batch is what it gives alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.policy.sampling import (
    Prefilled,
    Reasoned,
    _euler_step,
    act,
    act_best,
    append_token,
    begin_text,
    choose_token,
    continue_text,
    denoise,
    euler_times,
    prefill,
    reason,
    reasoned,
)
from fusevla.tokens.protocol import protocol_ids
from tests.golden_set import F32, relative_error
from tests.strategies import seeds
from tests.tiny import CAMERAS, VOCAB, ending_with, exchanged, tiny_batch, tiny_model

IDS = protocol_ids(VOCAB)
STEPS = 8
MODEL = tiny_model()
few = settings(max_examples=10)

encode = jax.jit(prefill, static_argnums=2)
think = jax.jit(lambda model, state, active: reason(model, state, STEPS, active=active))


def prompts(batch: int = 4, text: int = 9, seed: int = 0):
    """Prompts of several lengths."""
    valid = np.arange(text)[None] < np.random.default_rng(seed).integers(3, text + 1, batch)[:, None]
    return tiny_batch(valid, np.zeros_like(valid), seed).observation


OBSERVATION = prompts()
WRITTEN_ALONE, _ = think(MODEL, encode(MODEL, OBSERVATION, STEPS), None)
STOPPING, RENAMED = ending_with(MODEL, OBSERVATION, int(WRITTEN_ALONE.tokens[0, 3]))
"""Sample 0 ends with its fourth token."""
STATE = encode(STOPPING, RENAMED, STEPS + 1)
READ_LATER = ("valid", "length", "hidden", "logits", "decision")
WRITTEN = ("tokens", "length", "finished")


def rows(value: Prefilled | Reasoned, keep: np.ndarray) -> list[np.ndarray]:
    """The leaves with a batch axis that a later step may read, of some samples."""
    return [np.asarray(getattr(value, name))[keep] for name in (READ_LATER if isinstance(value, Prefilled) else WRITTEN)]


@few
@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_idle_samples_write_nothing_stay_as_they_were_and_change_nobody(active):
    active = np.array(active)
    every, _ = think(STOPPING, STATE, jnp.ones(4, bool))
    some, after = think(STOPPING, STATE, jnp.asarray(active))
    for ours, alone in zip(rows(some, active), rows(every, active), strict=True):
        np.testing.assert_array_equal(ours, alone)
    assert np.all(np.asarray(some.tokens)[~active] == IDS.pad)
    assert np.all(np.asarray(some.length)[~active] == 0)
    assert np.all(np.asarray(some.finished)[~active])
    for ours, before in zip(rows(after, ~active), rows(STATE, ~active), strict=True):
        np.testing.assert_allclose(ours, before, rtol=1e-6)


def test_the_loop_ends_with_the_last_active_sample():
    only_first = jnp.arange(4) == 0
    written, after = think(STOPPING, STATE, only_first)
    assert written.tokens[0, 3] == IDS.eos
    assert int(after.used - STATE.used) == 4
    _, nobody = think(STOPPING, STATE, jnp.zeros(4, bool))
    assert int(nobody.used) == int(STATE.used)
    written, after = think(STOPPING, STATE, None)
    assert int(after.used - STATE.used) == int(jnp.max(written.length)) > 4


@settings(max_examples=4)
@given(st.lists(st.sets(st.sampled_from(CAMERAS)), min_size=4, max_size=4), seeds())
def test_each_sample_of_a_mixed_batch_is_what_it_is_alone(missing, seed):
    """Prompt lengths, missing cameras and the end of the text differ from sample to sample."""
    masks = {name: jnp.array([name not in gone for gone in missing]) for name in CAMERAS}
    observation = eqx.tree_at(lambda o: o.image_masks, prompts(seed=seed), masks)
    noise = jax.random.normal(jax.random.key(seed), (4, 2, 4, 5))
    together = answer(STOPPING, observation, noise)
    for row in range(4):
        alone = answer(STOPPING, *jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (observation, noise)))
        assert relative_error(together[0][row], alone[0][0]) <= F32
        assert relative_error(together[1][row], alone[1][0]) <= F32
        if alone[2][0] > 1e-4:  # nowhere were two words a tie
            np.testing.assert_array_equal(together[3].tokens[row], alone[3].tokens[0])


@jax.jit
def answer(model, observation, noise):
    """Logits at the end of the prompt, actions, the smallest gap between the two best words of a thought, and the thought."""
    state = prefill(model, observation, STEPS + 1)
    written, _ = reason(model, state, STEPS)
    gaps, reading = [], state
    for step in range(STEPS - 1):
        reading = append_token(model, reading, written.tokens[:, step], jnp.ones(len(written.tokens), bool))
        best = jax.lax.top_k(reading.logits.at[:, jnp.array(IDS.protocol)].set(-1e9), 2)[0]
        gaps.append(best[:, 0] - best[:, 1])
    return state.logits, act(model, state, noise, 3), jnp.min(jnp.stack(gaps), axis=0), written


drawn = jax.jit(lambda model, state, seeds: reason(model, state, STEPS, seeds=seeds, temperature=1.5)[0])


def test_a_drawn_thought_depends_on_its_own_seed_alone():
    seeds = jnp.array([3, 4, 3, 4], jnp.int32)
    together = drawn(MODEL, STATE, seeds)
    others = drawn(MODEL, STATE, seeds.at[1:].set(jnp.array([7, 8, 9], jnp.int32)))
    np.testing.assert_array_equal(others.tokens[0], together.tokens[0])
    assert np.any(np.asarray(others.tokens) != together.tokens, axis=1)[1:].all()
    alone = drawn(MODEL, encode(MODEL, jax.tree.map(lambda leaf: leaf[2:3], RENAMED), STEPS + 1), seeds[2:3])
    np.testing.assert_array_equal(alone.tokens[0], drawn(MODEL, encode(MODEL, RENAMED, STEPS + 1), seeds).tokens[2])


def test_words_are_drawn_as_often_as_they_are_likely():
    rng, count = np.random.default_rng(0), 4000
    logits = jnp.asarray(np.tile(rng.normal(0, 2, VOCAB).astype(np.float32), (count, 1))).at[:, IDS.boa].set(50.0)
    state = eqx.tree_at(lambda s: s.logits, STATE, logits)
    choices = np.asarray(jax.jit(choose_token, static_argnums=2)(state, jax.random.split(jax.random.key(0), count), 2.0))
    allowed = np.delete(np.arange(VOCAB), list(IDS.protocol))
    likely = np.asarray(jax.nn.softmax(logits[0, allowed] / 2.0))
    found = np.bincount(choices, minlength=VOCAB) / count
    assert set(choices) <= set(allowed.tolist())
    np.testing.assert_allclose(found[allowed], likely, atol=5 * np.sqrt(likely.max() / count))


def test_drawing_needs_seeds():
    with pytest.raises(ValueError, match=r"temperature: 0.5 needs a seed"):
        reason(MODEL, STATE, STEPS, temperature=0.5)


def test_a_thought_in_pieces_is_the_whole_thought():
    seeds, active = jnp.arange(4, dtype=jnp.int32), jnp.array([True, True, False, True])
    go_on = jax.jit(lambda model, text: continue_text(model, text, 3, seeds=seeds, temperature=1.5))
    whole, after = jax.jit(lambda m, s: reason(m, s, STEPS, seeds=seeds, temperature=1.5, active=active))(STOPPING, STATE)
    text, steps = begin_text(STOPPING, STATE, STEPS, active), []
    for _ in range(4):
        text = go_on(STOPPING, text)
        steps.append(int(text.step))
    assert steps == [3, 6, STEPS, STEPS]
    for ours, theirs in zip(jax.tree.leaves(reasoned(text)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert relative_error(text.state.logits, after.logits) <= F32


def test_a_pad_that_the_model_writes_itself_counts_and_ends_nothing():
    model, observation = exchanged(MODEL, OBSERVATION, int(WRITTEN_ALONE.tokens[0, 3]), IDS.pad)
    written, _ = think(model, encode(model, observation, STEPS + 1), None)
    assert written.tokens[0, 3] == IDS.pad
    assert (int(written.length[0]), bool(written.finished[0])) == (STEPS, False)


def test_flow_times_known_beforehand_are_those_of_the_loop():
    noise = jax.random.normal(jax.random.key(0), (4, 2, 4, 5))
    times = jax.jit(euler_times, static_argnums=1)(MODEL, 5)
    ours = jax.jit(denoise, static_argnums=3)(MODEL, STATE, noise, 5)
    np.testing.assert_array_equal(jax.jit(denoise, static_argnums=3)(MODEL, STATE, noise, 5, times), ours)
    carry, dt = (noise, jnp.float32(1.0)), -1.0 / 5
    room = noise.shape[1] * noise.shape[2]
    grown = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    state = eqx.tree_at(
        lambda s: (s.cache.key, s.cache.value, s.valid),
        STATE,
        (jnp.pad(STATE.cache.key, grown), jnp.pad(STATE.cache.value, grown), jnp.pad(STATE.valid, ((0, 0), (0, room)))),
    )
    step = jax.jit(lambda carry: _euler_step(MODEL, state, dt, carry, None)[0])
    for _ in range(5):  # each step embeds its own time, as training does
        carry = step(carry)
    assert relative_error(ours, carry[0]) <= F32


def test_the_best_candidate_of_each_sample_is_kept():
    noise = jax.random.normal(jax.random.key(3), (4, 3, 4, 5))
    candidates = jax.jit(act, static_argnums=3)(STOPPING, STATE, noise, 2)
    wanted = np.array([2, 0, 1, 1])

    def score(observation, chunks):  # near the chunk that is wanted; the others of sample 3 are NaN, two of sample 1 are equal
        distance = jnp.sum(jnp.abs(chunks - candidates[jnp.arange(4), wanted][:, None]), axis=(2, 3))
        scores = (-distance).at[1].set(jnp.array([1.0, 1.0, 0.0])) + 0.0 * observation.state[:, :1]
        return scores.at[3].set(jnp.array([jnp.nan, -5.0, jnp.nan]))

    choose = jax.jit(lambda model, state, seen, noise: act_best(model, state, seen, noise, score, 2))
    best, scores = choose(STOPPING, STATE, RENAMED, noise)
    np.testing.assert_array_equal(best, np.asarray(candidates)[np.arange(4), wanted])
    assert scores.shape == (4, 3)
