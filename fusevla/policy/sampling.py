"""Inference on a fixed-size key/value cache: prefill -> reason or act. Pure functions; jit them at the boundary.

Slots of the cache are common to a batch (prefix first, then what is appended); positions and validity are each sample's own,
so that every sample of a mixed batch gives what it gives alone.
"""

import dataclasses
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Array, Bool, Float, Int, Observation
from fusevla.model.fuse import Pi0Fuse, Prefix, embed_actions, embed_prefix, embed_time, velocity
from fusevla.model.gemma import KVCache, Modulations, Stream, modulations_at, transformer, with_modulations
from fusevla.model.masks import attention_mask, blocks_after_cache, positions, prefix_of
from fusevla.tokens.protocol import protocol_ids

MAX_NEW_TOKENS = 256
NEVER = -1e30
Score = Callable[[Observation, Float[Array, "b k h a"]], Float[Array, "b k"]]
"""How good each candidate chunk is for what is seen (its text holds the thought); a pure function, higher is better."""


class Prefilled(eqx.Module):
    """An encoded observation: its cache (with free slots behind), and the last valid token's output.

    ``valid`` says which slots hold a token, ``length`` how many tokens each sample has (the next RoPE position),
    ``used`` the first free slot, ``decision`` the float32 logits of (reason, act) at each sample's own END_OF_PREFIX.
    """

    cache: KVCache
    valid: Bool[Array, "b c"]
    length: Int[Array, " b"]
    used: Int[Array, ""]
    hidden: Float[Array, "b d"]
    logits: Float[Array, "b v"]
    decision: Float[Array, "b 2"]
    reserve: int = eqx.field(static=True)
    """Slots that were free behind the prefix."""


class Decoding(eqx.Module):
    """Text that is being written: ``step`` tokens of it, which samples have come to their end, and what has been read."""

    step: Int[Array, ""]
    done: Bool[Array, " b"]
    tokens: Int[Array, "b t"]
    state: Prefilled
    began: Int[Array, " b"]
    """The samples' lengths without it."""


class Reasoned(eqx.Module):
    """Decoded text: ``tokens`` start with BEGIN_OF_REASONING, end with EOS (where it came in time), then PAD."""

    tokens: Int[Array, "b t"]
    length: Int[Array, " b"]
    finished: Bool[Array, " b"]


def prefill(model: Pi0Fuse, observation: Observation, reserve: int = MAX_NEW_TOKENS + 1) -> Prefilled:
    """Encodes images and the bidirectional prefix (anything from the first causal token on is left out).

    ``reserve`` slots are kept free for what is appended: text (``reason``) or BEGIN_OF_ACTION (``act``).
    """
    prefix_mask = prefix_of(observation.token_mask, observation.token_ar_mask)
    bare = eqx.tree_at(lambda o: o.token_mask, observation, prefix_mask)
    return _encode(model, embed_prefix(model, bare), reserve)


def _encode(model: Pi0Fuse, prefix: Prefix, reserve: int) -> Prefilled:
    mask, where = attention_mask(prefix.valid, prefix.ar), positions(prefix.valid)
    (hidden,), cache = transformer(
        (model.language,), (Stream(prefix.tokens),), mask, where, implementation=model.config.attention, keep_cache=True
    )
    slots = prefix.valid.shape[1]
    last = slots - 1 - jnp.argmax(jnp.flip(prefix.valid, axis=1), axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    grown = _grown(cast(KVCache, cache), reserve)
    valid = jnp.pad(prefix.valid, ((0, 0), (0, reserve)))
    length = jnp.sum(prefix.valid, axis=1, dtype=jnp.int32)
    return _state(model, grown, valid, length, jnp.int32(slots), final, reserve)


def _state(model: Pi0Fuse, cache: KVCache, valid: Array, length: Array, used: Array, hidden: Array, reserve: int) -> Prefilled:
    logits = model.embedder.unembed(hidden)
    ids = protocol_ids(model.config.vocab_size)
    return Prefilled(cache, valid, length, used, hidden, logits, logits[:, jnp.array([ids.bor, ids.boa])], reserve)


def _grown(cache: KVCache, extra: int) -> KVCache:
    room = [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)]
    return KVCache(jnp.pad(cache.key, room), jnp.pad(cache.value, room))


def append_token(model: Pi0Fuse, state: Prefilled, token: Int[Array, " b"], present: Bool[Array, " b"]) -> Prefilled:
    """Feeds one token to each sample; where ``present`` is False the slot stays invalid and the sample as it was."""
    valid = jax.lax.dynamic_update_slice_in_dim(state.valid, present[:, None], state.used, axis=1)
    tokens = model.embedder.embed(token[:, None], model.config.dtype)
    (hidden,), cache = transformer(
        (model.language,),
        (Stream(tokens),),
        valid[:, None, :],
        state.length[:, None],
        implementation=model.config.attention,
        cache=state.cache,
        slot=state.used,
        keep_cache=True,
    )
    final = jnp.where(present[:, None], hidden[:, 0], state.hidden)
    length = state.length + present.astype(jnp.int32)
    return _state(model, cast(KVCache, cache), valid, length, state.used + 1, final, state.reserve)


def reason(
    model: Pi0Fuse,
    state: Prefilled,
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    seeds: Int[Array, " b"] | None = None,
    temperature: float = 0.0,
    active: Bool[Array, " b"] | None = None,
) -> tuple[Reasoned, Prefilled]:
    """Decodes a thought for every sample: BEGIN_OF_REASONING forced first, protocol tokens never inside the text.

    Greedy at temperature 0, else drawn with each sample's own seed (int32). Each sample stops at its own EOS; the loop ends when
    all have. Samples that are not ``active`` (default: all are) write nothing but PAD, stay as they were, and are waited for by
    nobody. ``max_new_tokens`` counts BEGIN_OF_REASONING and must fit the cache's reserve.
    """
    begun = begin_text(model, state, max_new_tokens, active)
    written = continue_text(model, begun, max_new_tokens, seeds=seeds, temperature=temperature)
    return reasoned(written), written.state


def begin_text(model: Pi0Fuse, state: Prefilled, max_new_tokens: int, active: Bool[Array, " b"] | None = None) -> Decoding:
    """No token of a thought yet; the parameters are those of ``reason``."""
    if max_new_tokens > state.reserve:
        raise ValueError(f"reason: {max_new_tokens} new tokens do not fit the {state.reserve} slots that prefill reserved")
    batch = state.length.shape[0]
    idle = jnp.zeros(batch, bool) if active is None else jnp.logical_not(active)
    tokens = jnp.full((batch, max_new_tokens), protocol_ids(model.config.vocab_size).pad, jnp.int32)
    return Decoding(jnp.int32(0), idle, tokens, state, state.length)


def continue_text(
    model: Pi0Fuse, text: Decoding, steps: int, *, seeds: Int[Array, " b"] | None = None, temperature: float = 0.0
) -> Decoding:
    """Up to ``steps`` tokens more: a thought in pieces is the same thought, and others may have the device in between."""
    ids = protocol_ids(model.config.vocab_size)
    end = jnp.minimum(text.step + steps, text.tokens.shape[1])

    def unfinished(text: Decoding) -> jax.Array:
        return (jnp.asarray(text.step) < end) & jnp.logical_not(jnp.all(text.done))

    def decode(text: Decoding) -> Decoding:
        keys = None if seeds is None else jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), text.step))(seeds)
        choice = choose_token(text.state, keys, temperature)
        token = jnp.where(text.done, ids.pad, jnp.where(text.step == 0, ids.bor, choice))
        state = append_token(model, text.state, token, jnp.logical_not(text.done))
        tokens = jnp.asarray(text.tokens).at[:, text.step].set(token)
        return Decoding(text.step + 1, text.done | (token == ids.eos), tokens, state, text.began)

    return jax.lax.while_loop(unfinished, decode, text)


def reasoned(text: Decoding) -> Reasoned:
    """What has been written so far."""
    return Reasoned(text.tokens, text.state.length - text.began, text.done)


def choose_token(state: Prefilled, keys: Array | None = None, temperature: float = 0.0) -> Int[Array, " b"]:
    """The next token of a thought (int32), never a protocol token: the likeliest at temperature 0, else drawn.

    ``keys`` [b] are needed for drawing, one for each sample: what others draw changes nothing.
    """
    ids = protocol_ids(state.logits.shape[1])
    logits = jnp.asarray(state.logits).at[:, jnp.array(ids.protocol)].set(NEVER)
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError(f"temperature: {temperature:g} needs a seed for each sample")
    return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)


def act(
    model: Pi0Fuse, state: Prefilled, noise: Float[Array, "b r h a"], num_steps: int = 10, times: Modulations | None = None
) -> Float[Array, "b r h a"]:
    """Appends BEGIN_OF_ACTION and denoises r candidate chunks per sample, blind to each other, from one prefill.

    ``times`` is ``euler_times(model, num_steps)``, where it is kept from call to call.
    """
    ids = protocol_ids(model.config.vocab_size)
    batch = state.length.shape[0]
    begin = jnp.full(batch, ids.boa, jnp.int32)
    return denoise(model, append_token(model, state, begin, jnp.ones(batch, bool)), noise, num_steps, times)


def act_best(
    model: Pi0Fuse,
    state: Prefilled,
    observation: Observation,
    noise: Float[Array, "b k h a"],
    score: Score,
    num_steps: int = 10,
    times: Modulations | None = None,
) -> tuple[Float[Array, "b h a"], Float[Array, "b k"]]:
    """Draws k candidate chunks from one prefill of ``observation`` and keeps, for each sample, the one that scores best.

    The place for a runtime verifier, say of how well actions do what the thought says. Returns the chunks and all scores; the
    first of equals wins, and NaN is worse than any number.
    """
    candidates = act(model, state, noise, num_steps, times)
    scores = score(observation, candidates)
    best = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None, None], axis=1)[:, 0], scores


def sample_actions(
    model: Pi0Fuse, observation: Observation, noise: Float[Array, "b r h a"], num_steps: int = 10
) -> Float[Array, "b r h a"]:
    """Encodes the observation as given (suffix tokens included) and denoises."""
    return denoise(model, _encode(model, embed_prefix(model, observation), 0), noise, num_steps)


def euler_times(model: Pi0Fuse, num_steps: int = 10) -> Modulations:
    """What the flow time does to the action expert at each Euler step (a leading axis of steps): a function of weights alone."""
    # one addition after the other, as the loop's own time: the fastest sinusoid turns by 1e-4 in a float32's last bit
    times = np.cumsum(np.array([1.0] + [-1.0 / num_steps] * (num_steps - 1), np.float32))

    def at(time: jax.Array) -> Modulations:
        return modulations_at(model.action, embed_time(model, time[None, None]).astype(model.config.dtype))

    return jax.vmap(at)(jnp.asarray(times))


def denoise(
    model: Pi0Fuse, state: Prefilled, noise: Float[Array, "b r h a"], num_steps: int, times: Modulations | None = None
) -> Float[Array, "b r h a"]:
    """Euler from t=1 (noise) to t=0 with dt = -1/num_steps; the action blocks get cache slots of their own."""
    room = noise.shape[1] * noise.shape[2]
    state = eqx.tree_at(
        lambda s: (s.cache, s.valid), state, (_grown(state.cache, room), jnp.pad(state.valid, ((0, 0), (0, room))))
    )

    def step(carry: tuple[Array, Array], now: Modulations) -> tuple[tuple[Array, Array], None]:
        at_time = dataclasses.replace(model, action=with_modulations(model.action, now))
        return _euler_step(at_time, state, -1.0 / num_steps, carry, None)

    known = euler_times(model, num_steps) if times is None else times
    (actions, _), _ = jax.lax.scan(step, (noise, jnp.float32(1.0)), known, length=num_steps)
    return actions


def _euler_step(
    model: Pi0Fuse, state: Prefilled, dt: float, carry: tuple[Array, Array], _: None
) -> tuple[tuple[Array, Array], None]:
    x, time = carry
    batch, draws, horizon = x.shape[:3]
    slot = state.valid.shape[1] - draws * horizon
    steps = jnp.tile(jnp.arange(horizon, dtype=jnp.int32), draws)
    (hidden,), _unused = transformer(
        (model.action,),
        (embed_actions(model, x, jnp.full((batch, draws), time)),),
        blocks_after_cache(state.valid, slot, draws, horizon),
        state.length[:, None] + steps[None],
        implementation=model.config.attention,
        cache=state.cache,
        slot=slot,
    )
    return (x + dt * velocity(model, hidden, draws), time + dt), None
