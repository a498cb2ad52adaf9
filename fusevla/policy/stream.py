"""A thought as it is written: tokens one at a time on the host, text as soon as it is whole."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from fusevla.arrays import Array
from fusevla.model.fuse import Pi0Fuse
from fusevla.policy.sampling import MAX_NEW_TOKENS, Prefilled, append_token, choose_token
from fusevla.tokens.protocol import protocol_ids
from fusevla.tokens.tokenizer import Tokenizer


def stream(model: Pi0Fuse, state: Prefilled, tokenizer: Tokenizer, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
    """Pieces of the greedy thought of one observation; joined, they are the text of what ``reason`` decodes.

    ``max_new_tokens`` means what it means there. Raises ``ValueError`` for a batch, or tokens that prefill left no room for.
    """
    if state.length.shape[0] != 1:
        raise ValueError(f"stream: expected the state of one observation, got a batch of {state.length.shape[0]}; use reason")
    if max_new_tokens > state.reserve:
        raise ValueError(f"stream: {max_new_tokens} new tokens do not fit the {state.reserve} slots that prefill reserved")
    return text_pieces(_tokens(model, state, max_new_tokens), tokenizer)


def _tokens(model: Pi0Fuse, state: Prefilled, max_new_tokens: int) -> Iterator[int]:
    ids = protocol_ids(model.config.vocab_size)
    token: Array = jnp.full(1, ids.bor, jnp.int32)
    for _ in range(max_new_tokens - 1):
        token, state = _next_token(model, state, token)
        if int(token[0]) == ids.eos:
            return
        yield int(token[0])


@jax.jit
def _next_token(model: Pi0Fuse, state: Prefilled, token: Array) -> tuple[Array, Prefilled]:
    """The token after ``token``, and the state that has read ``token``."""
    state = append_token(model, state, token, jnp.ones(1, bool))
    return choose_token(state), state


def text_pieces(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """What each id adds to the text; a character spelled in bytes comes when its last byte has come."""
    read: list[int] = []
    given = text = ""
    for number in ids:
        read.append(number)
        text = tokenizer.decode(read)
        whole = text.rstrip("\ufffd")  # the mark of bytes that are no character yet, or never
        if len(whole) > len(given):
            yield whole[len(given) :]
            given = whole
    if len(text) > len(given):
        yield text[len(given) :]
