"""The two Gemma experts and the attention that they share (pi0.5; openpi ``gemma.py``@15a9616a).

In every layer each expert projects its own tokens, queries, keys and values are joined along the sequence (language first),
attention runs once, and each expert projects its own part back. Layers are stacked on axis 0 and scanned.
"""

import dataclasses
from functools import partial
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Bool, Float, Int, Key
from fusevla.model.attention import Implementation, attention
from fusevla.model.layers import (
    AdaRMSNorm,
    Dense,
    Einsum,
    ModulatedNorm,
    Norm,
    RMSNorm,
    checkpointed,
    gated_residual,
    lecun_normal,
)
from fusevla.model.rope import apply_rope
from fusevla.model.storage import is_stored, restore
from fusevla.presets import ExpertConfig, Remat

PIECE = 128
"""Positions whose feed-forward activations exist at the same time in the backward pass: 128 x 16,384 x 3 for each sample."""


class ExpertLayer(eqx.Module):
    """One expert's share of a transformer block. ``kv`` holds keys at index 0, values at 1; ``gating`` the gelu branch at 0."""

    pre_attention_norm: Norm
    q: Einsum
    kv: Einsum
    out: Einsum
    pre_ffw_norm: Norm
    gating: Einsum
    linear: Einsum

    def feed_forward(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Gated gelu (tanh approximation)."""
        gate, value = self.gating("bsd,cdf->cbsf", x)
        return self.linear("bsf,fd->bsd", jax.nn.gelu(gate, approximate=True) * value)


class Expert(eqx.Module):
    """A stack of layers and the final norm."""

    layers: ExpertLayer
    final_norm: Norm


class Modulations(eqx.Module):
    """Every norm of the action expert at a flow time: what the time does to it, as values."""

    pre_attention_norm: ModulatedNorm
    pre_ffw_norm: ModulatedNorm
    final_norm: ModulatedNorm


def modulations_at(expert: Expert, cond: Float[Array, "b r c"]) -> Modulations:
    """Evaluates the adaptive norms of every layer for a condition in the compute dtype."""
    every_layer = jax.vmap(lambda norm: restore(norm).at(cond))
    layers = expert.layers
    return Modulations(
        every_layer(layers.pre_attention_norm), every_layer(layers.pre_ffw_norm), cast(AdaRMSNorm, expert.final_norm).at(cond)
    )


def with_modulations(expert: Expert, known: Modulations) -> Expert:
    """The expert at the flow time of ``known``: a condition given to it means nothing."""
    layers = dataclasses.replace(expert.layers, pre_attention_norm=known.pre_attention_norm, pre_ffw_norm=known.pre_ffw_norm)
    return Expert(layers, known.final_norm)


class KVCache(eqx.Module):
    """Keys (after RoPE) and values of every layer, of fixed length c; which slots are valid is the caller's mask."""

    key: Float[Array, "*layers b c m e"]
    value: Float[Array, "*layers b c m e"]


Carry = tuple[tuple[Array, ...], KVCache]


class Stream(eqx.Module):
    """What one expert brings to the shared attention: its tokens, and the flow-time condition of its norms (or None)."""

    tokens: Float[Array, "b s d"]
    cond: Float[Array, "b r c"] | None = None


def transformer(
    experts: tuple[Expert, ...],
    streams: tuple[Stream, ...],
    mask: Bool[Array, "b q k"],
    positions: Int[Array, "b q"],
    *,
    implementation: Implementation,
    remat: Remat = "none",
    cache: KVCache | None = None,
    slot: Int[Array, ""] | int = 0,
    keep_cache: bool = False,
    read: int | None = None,
) -> tuple[tuple[Float[Array, "b _ _"], ...], KVCache | None]:
    """Runs the experts' stacks over their streams, joined in order; returns their final-normed outputs and the cache.

    Without ``cache``, keys are the tokens given (k = q). With it, the new keys and values are written from ``slot`` on and
    attention runs over all c slots (k = c). The updated cache comes back if ``keep_cache``; otherwise None. Of the first
    stream only the last ``read`` tokens come back (None: all): in training, the last layer makes no others.
    """
    skip = 0 if read is None else streams[0].tokens.shape[1] - read
    stacks = (tuple(expert.layers for expert in experts), cache)
    stored, arrays = eqx.partition(stacks, is_stored, is_leaf=is_stored)

    def block(skip: int, tokens: tuple[Array, ...], index: Array, arrays: Any, stored: Any, shared: Any) -> Carry:
        conds, mask, positions, slot = shared
        # Taken from the stack in here, so that a backward pass keeps the number of the layer, not its weights.
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stored)
        layers, past = restore(eqx.combine(arrays, own, is_leaf=is_stored))
        joined = tuple(Stream(x, cond) for x, cond in zip(tokens, conds, strict=True))
        return _block(layers, joined, mask, positions, implementation, past, slot, remat, skip)

    def run(skip: int, tokens: tuple[Array, ...], index: Array, arrays: Any) -> Carry:
        shared = (tuple(stream.cond for stream in streams), mask, positions, slot)
        return checkpointed(partial(block, skip), remat)(tokens, index, arrays, stored, shared)

    def step(tokens: tuple[Array, ...], layer: Any) -> tuple[tuple[Array, ...], KVCache | None]:
        tokens, kept = run(0, tokens, *layer)
        return tokens, (kept if keep_cache else None)

    # Arrays cannot be taken off a stack without a copy of the rest: only where frozen ones are stored is it a small one.
    apart = skip > 0 and bool(jax.tree.leaves(stored))
    depth = jax.tree.leaves(stacks)[0].shape[0]
    most = depth - apart
    start, layers = tuple(stream.tokens for stream in streams), (jnp.arange(most), jax.tree.map(lambda x: x[:most], arrays))
    tokens, new_cache = jax.lax.scan(step, start, layers)
    if apart:
        tokens, _ = run(skip, tokens, jnp.int32(depth - 1), jax.tree.map(lambda x: x[-1], arrays))
    elif skip:
        tokens = (tokens[0][:, skip:], *tokens[1:])
    outputs = (e.final_norm(x, s.cond)[0] for e, x, s in zip(experts, tokens, streams, strict=True))
    return tuple(outputs), new_cache


def _block(
    layers: tuple[ExpertLayer, ...],
    streams: tuple[Stream, ...],
    mask: Array,
    positions: Array,
    implementation: Implementation,
    cache: KVCache | None,
    slot: Array | int,
    remat: Remat,
    skip: int,
) -> Carry:
    """One layer of every expert around their shared attention; the first ``skip`` tokens give keys and values only."""
    normed = [layer.pre_attention_norm(s.tokens, s.cond) for layer, s in zip(layers, streams, strict=True)]
    both = [layer.kv("bsd,cmde->cbsme", x) for layer, (x, _) in zip(layers, normed, strict=True)]
    key, value = jnp.concatenate(both, axis=2)
    key = apply_rope(key, positions)
    if cache is not None:
        key = jax.lax.dynamic_update_slice_in_dim(cache.key, key, slot, axis=1)
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, value, slot, axis=1)
    asking, residual = _without(skip, [x for x, _ in normed]), _without(skip, [s.tokens for s in streams])
    query = jnp.concatenate([layer.q("bsd,nde->bsne", x) for layer, x in zip(layers, asking, strict=True)], axis=1)
    query = apply_rope(query, positions[:, skip:]) * query.shape[-1] ** -0.5
    encoded = attention(query, key, value, mask[:, skip:], implementation)
    ends = [sum(x.shape[1] for x in asking[: i + 1]) for i in range(len(asking) - 1)]
    outputs = []
    parts = (layers, streams, residual, _without(skip, [gate for _, gate in normed]), jnp.split(encoded, ends, axis=1))
    for layer, stream, x, gate, part in zip(*parts, strict=True):
        x = gated_residual(x, layer.out("bsne,ned->bsd", part), gate)
        h, gate = layer.pre_ffw_norm(x, stream.cond)
        outputs.append(gated_residual(x, _feed_forward(layer, h, remat), gate))
    return tuple(outputs), KVCache(key, value)


def _without(skip: int, streams: list[Any]) -> list[Any]:
    """The streams without the first tokens of the first."""
    first, *others = streams
    return [None if first is None else first[:, skip:], *others]


def _feed_forward(layer: ExpertLayer, x: Float[Array, "b s d"], remat: Remat) -> Float[Array, "b s d"]:
    """The layer's own, for PIECE positions at a time where the backward pass keeps nothing: it recomputes but one piece then.

    Positions are what is cut, since samples may lie on several devices.
    """
    if remat != "full" or x.shape[1] <= PIECE:
        return layer.feed_forward(x)
    at_position = jax.checkpoint(lambda x: layer.feed_forward(x[:, None])[:, 0], prevent_cse=False)
    return jnp.moveaxis(jax.lax.map(at_position, jnp.moveaxis(x, 1, 0), batch_size=PIECE), 0, 1)


def init_expert(config: ExpertConfig, cond_width: int | None, key: Key) -> Expert:
    """An expert from scratch (no adapters): lecun-normal matrices, zero norm scales.

    With ``cond_width`` the norms are AdaRMS: zero kernels and a bias that starts every gate at one, so that the expert is an
    ordinary transformer at step 0 and the flow time comes in as it is learned.
    """
    layers = jax.vmap(lambda k: _init_layer(config, cond_width, k))(jax.random.split(key, config.depth))
    return Expert(layers, _init_norm(config.width, cond_width))


def _init_norm(width: int, cond_width: int | None) -> Norm:
    if cond_width is None:
        return RMSNorm(jnp.zeros(width))
    bias = jnp.concatenate([jnp.zeros(2 * width), jnp.ones(width)])
    return AdaRMSNorm(Dense(jnp.zeros((cond_width, 3 * width)), bias))


def _init_layer(config: ExpertConfig, cond_width: int | None, key: Key) -> ExpertLayer:
    d, f, n, m, e = config.width, config.mlp_dim, config.num_heads, config.num_kv_heads, config.head_dim
    q, kv, out, gating, linear = jax.random.split(key, 5)
    return ExpertLayer(
        pre_attention_norm=_init_norm(d, cond_width),
        q=Einsum(lecun_normal(q, (n, d, e), d)),
        kv=Einsum(lecun_normal(kv, (2, m, d, e), d)),
        out=Einsum(lecun_normal(out, (n, e, d), n * e)),
        pre_ffw_norm=_init_norm(d, cond_width),
        gating=Einsum(lecun_normal(gating, (2, d, f), d)),
        linear=Einsum(lecun_normal(linear, (f, d), f)),
    )
