"""Decoding and acting on a tiny model: what each sample gives in a batch is what it gives alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.policy.sampling import Prefilled, Reasoned, prefill, reason
from fusevla.tokens.protocol import protocol_ids
from tests.tiny import VOCAB, tiny_batch, tiny_model

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


def with_early_eos(observation, steps=STEPS):
    """A model and prompts with renamed words: what sample 0 wrote as its fourth token is now called EOS."""
    written, _ = think(MODEL, encode(MODEL, observation, steps), None)
    word = int(written.tokens[0, 3])
    rename = np.arange(VOCAB)
    rename[[word, IDS.eos]] = rename[[IDS.eos, word]]
    model = eqx.tree_at(lambda m: m.embedder.table, MODEL, MODEL.embedder.table[rename])
    return model, eqx.tree_at(lambda o: o.tokens, observation, jnp.asarray(rename[np.asarray(observation.tokens)], jnp.int32))


OBSERVATION = prompts()
STOPPING, RENAMED = with_early_eos(OBSERVATION)
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
