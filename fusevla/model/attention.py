"""Attention, once: a plain form that anyone can read and the fused ones that JAX offers, behind the same function."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from einops import rearrange

from fusevla.arrays import Array, Bool, Float
from fusevla.presets import Attention as Implementation

__all__ = ["Implementation", "attention", "evened"]

MASKED = -2.3819763e38
"""Finite, so that a row which may attend to nothing gives a meaningless average instead of NaN (and NaN gradients)."""


def attention(
    query: Float[Array, "b q n e"],
    key: Float[Array, "b k m e"],
    value: Float[Array, "b k m e"],
    mask: Bool[Array, "b q k"] | None,
    implementation: Implementation = "plain",
    softmax_dtype: str = "float32",
) -> Float[Array, "b q n e"]:
    """Grouped-query attention on *already scaled* queries: logits and softmax in float32, probabilities in ``value``'s dtype.

    ``n`` query heads share ``m`` key/value heads. ``implementation`` is explicit, never a guess: "plain" is the readable
    einsum form; "xla" and "cudnn" are ``jax.nn.dot_product_attention``; "auto" must have been resolved before
    (``attention_choice.with_attention``) and is a ``ValueError`` here. cuDNN takes bfloat16 only, refuses head_dim 256 below
    sm_90 and, with a mask, odd lengths in training, which are padded here; it raises on CPU. Another ``softmax_dtype`` than
    float32 exists to reproduce openpi's image tower and always takes the plain form.
    """
    if implementation == "auto":
        raise ValueError(
            "attention: expected plain, xla or cudnn by the time a model runs, got auto; "
            "fusevla.model.attention_choice.with_attention(config) chooses for this device"
        )
    if implementation == "plain" or softmax_dtype != "float32":
        return _plain(query, key, value, mask, softmax_dtype)
    if mask is not None and implementation == "cudnn" and query.shape[1] > 1:  # one query: decoding, which never trains
        return evened(lambda q, k, v, m: _fused(q, k, v, m, "cudnn"), query, key, value, mask)
    return _fused(query, key, value, mask, implementation)


def evened(
    run: Callable[[Array, Array, Array, Array], Array],
    query: Float[Array, "b q n e"],
    key: Float[Array, "b k m e"],
    value: Float[Array, "b k m e"],
    mask: Bool[Array, "b q k"],
) -> Float[Array, "b q n e"]:
    """What ``run(query, key, value, mask)`` gives, which is called with even q and k.

    A key that is added is seen by nobody. A query that is added sees all others (no row is empty) and is cut off again.
    """
    q, k = query.shape[1] % 2, key.shape[1] % 2
    one_more = lambda x, by: jnp.pad(x, ((0, 0), (0, by), (0, 0), (0, 0)))
    mask = jnp.pad(jnp.pad(mask, ((0, 0), (0, q), (0, 0)), constant_values=True), ((0, 0), (0, 0), (0, k)))
    return run(one_more(query, q), one_more(key, k), one_more(value, k), mask)[:, : query.shape[1]]


def _fused(query: Array, key: Array, value: Array, mask: Array | None, implementation: Implementation) -> jax.Array:
    full = None if mask is None else jnp.broadcast_to(mask[:, None], (mask.shape[0], query.shape[2], *mask.shape[1:]))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes inside; the strict mode is for our own code
        return jax.nn.dot_product_attention(query, key, value, mask=full, scale=1.0, implementation=cast(Any, implementation))


def _plain(query: Array, key: Array, value: Array, mask: Array | None, softmax_dtype: str) -> jax.Array:
    grouped = rearrange(query, "b q (m g) e -> b q m g e", m=key.shape[2])
    logits = jnp.einsum("bqmge,bkme->bmgqk", grouped, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits.astype(softmax_dtype), axis=-1).astype(value.dtype)
    return rearrange(jnp.einsum("bmgqk,bkme->bqmge", weights, value), "b q m g e -> b q (m g) e")
