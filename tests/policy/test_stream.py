"""Text as it is written: the pieces make up what ``reason`` decodes at once."""

import dataclasses
import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.policy.sampling import prefill, reason
from fusevla.policy.stream import stream, text_pieces
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer
from tests.tiny import CONFIG, ending_with, tiny_batch, tiny_model


@functools.cache
def words() -> Tokenizer:
    return train_tokenizer(["Plan: pick up the mug.\nDone: nothing, élan ▁"], vocab_size=512, state_numbers=False)


@given(st.lists(st.integers(0, words().vocab_size - 1), max_size=30), st.text(max_size=10))
def test_pieces_join_to_the_text_and_come_as_early_as_they_can(ids, text):
    ids = [*ids, *words().encode(text)]
    assert "".join(text_pieces(ids, words())) == words().decode(ids)


def test_a_character_in_bytes_comes_in_one_piece():
    ids = words().encode("a😀b")
    assert len(ids) == 6
    assert list(text_pieces(ids, words())) == ["a", "😀", "b"]
    assert list(text_pieces(ids[:3], words())) == ["a", "\ufffd\ufffd"]


def test_a_stream_is_what_reason_decodes():
    model = tiny_model(dataclasses.replace(CONFIG, vocab_size=words().vocab_size), seed=19)
    model = eqx.tree_at(lambda m: m.embedder.table, model, model.embedder.table * 0.3)  # else it says one word for ever
    observation = tiny_batch(np.ones((1, 9), bool), np.zeros((1, 9), bool)).observation
    encode, decode = jax.jit(prefill, static_argnums=2), jax.jit(lambda model, state: reason(model, state, 12)[0])
    endless = decode(model, encode(model, observation, 12))
    ending = ending_with(model, observation, int(endless.tokens[0, 5]))
    for (policy, seen), length in (((model, observation), 12), (ending, 6)):
        state = encode(policy, seen, 12)
        written = decode(policy, state)
        assert int(written.length[0]) == length
        pieces = list(stream(policy, state, words(), 12))
        assert "".join(pieces) == words().decode(written.tokens[0])
        assert len(pieces) > 1


def test_what_cannot_be_streamed_is_said():
    observation = tiny_batch(np.ones((2, 9), bool), np.zeros((2, 9), bool)).observation
    model, encode = tiny_model(), jax.jit(prefill, static_argnums=2)
    with pytest.raises(ValueError, match="one observation, got a batch of 2"):
        stream(model, encode(model, observation, 4), words(), 4)
    one = encode(model, jax.tree.map(lambda leaf: leaf[:1], observation), 4)
    with pytest.raises(ValueError, match="5 new tokens do not fit the 4 slots"):
        stream(model, one, words(), 5)
