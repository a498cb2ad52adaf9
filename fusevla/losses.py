"""The joint loss as pure functions: cross-entropy on reasoning tokens + flow matching on actions.

``L = L_text + coeff * L_action`` (Wu et al. 2025, arXiv 2510.16281). Each part is a mean within its sample, the batch loss a
mean over samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Batch, Bool, Float, Int, Key
from fusevla.model.fuse import Pi0Fuse, forward
from fusevla.model.layers import Embedder, read_out
from fusevla.model.storage import is_stored, restore

T = TypeVar("T")
Triple = tuple[jax.Array, jax.Array, jax.Array]
Kept = tuple[Embedder, jax.Array, jax.Array, jax.Array, jax.Array]

CHUNK = 128
"""Positions whose logits exist at the same time: 128 x 257,152 float32 logits are 132 MB. A sample has 40 to 100 targets."""
WORDS = 32768
"""Rows of the table that are read at a time, at most: as float32 numbers (XLA's for CPUs) 268 MB at width 2048."""


class Flow(eqx.Module):
    """Noise and times of ``r`` flow-matching draws per sample. Time 1 is pure noise."""

    noise: Float[Array, "b r h a"]
    time: Float[Array, "b r"]


class SampleLosses(eqx.Module):
    """Per-sample losses and how many of the text targets the argmax hits."""

    text: Float[Array, " b"]
    action: Float[Array, " b"]
    correct: Int[Array, " b"]
    targets: Int[Array, " b"]


def draw_flow(key: Key, actions: Float[Array, "b h a"], draws: int = 1) -> Flow:
    """``time = Beta(1.5, 1) * 0.999 + 0.001``, noise standard normal; with one draw the values openpi draws from ``key``."""
    batch = actions.shape[0]
    _, noise_key, time_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, (batch, draws, *actions.shape[1:]), jnp.float32)
    return Flow(noise, jax.random.beta(time_key, 1.5, 1.0, (batch, draws), jnp.float32) * 0.999 + 0.001)


def noisy_actions(flow: Flow, actions: Float[Array, "b h a"]) -> tuple[Float[Array, "b r h a"], Float[Array, "b r h a"]]:
    """``x_t = t noise + (1 - t) actions`` and the velocity to learn, ``u = noise - actions``."""
    t = flow.time[..., None, None]
    clean = actions[:, None]
    return t * flow.noise + (1 - t) * clean, flow.noise - clean


def flow_matching_loss(
    predicted: Float[Array, "b r h a"], target: Float[Array, "b r h a"], is_pad: Bool[Array, "b h"] | None = None
) -> Float[Array, " b"]:
    """Mean squared error over draws, real steps and dimensions, a value per sample."""
    error = jnp.mean(jnp.square(predicted - target), axis=(1, 3))
    if is_pad is None:
        return jnp.mean(error, axis=1)
    real = jnp.logical_not(is_pad).astype(jnp.float32)
    return jnp.sum(error * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)


def token_nll(
    embedder: Embedder, hidden: Float[Array, "n d"], targets: Int[Array, " n"], wanted: Bool[Array, " n"], chunk: int = CHUNK
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """Negative log-likelihood of each *wanted* position and whether no word is likelier; zero and False elsewhere.

    Exact for any number of wanted positions. A loop takes ``chunk`` of them at a time and ends with the last one, so that
    neither pass ever holds more than ``chunk`` x vocabulary logits. While it has them it also takes the gradient with respect
    to ``hidden``, where that will be needed; only a table that trains has its logits computed again, in the backward pass.
    The table is read ``WORDS`` rows at a time, since a stored one exists as numbers only there.
    """
    return _token_nll(min(chunk, hidden.shape[0]), embedder, jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(wanted))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_nll(
    chunk: int, embedder: Embedder, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _token_nll_forward(chunk, embedder, hidden, targets, wanted)[0]  # XLA drops what the loop makes for nobody


def _token_nll_forward(
    chunk: int, embedder: Embedder, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Kept]:
    parts, firsts = _parts(embedder)

    def body(carry: Triple, at: jax.Array, rows: jax.Array, words: jax.Array) -> Triple:
        logits = _logits(parts, rows)
        nll, hit, normalizer = _of_logits(logits, words)

        def step(slope: jax.Array, part: tuple[Any, Array, jax.Array]) -> tuple[jax.Array, None]:
            # Both factors in the dtype of the forward product: a float32 factor would make XLA copy the table to float32.
            table, error = restore(part[0]).astype(rows.dtype), _error(part[1], normalizer, words - part[2]).astype(rows.dtype)
            return slope + jnp.einsum("nw,wd->nd", error, table, preferred_element_type=jnp.float32), None

        slope, _ = jax.lax.scan(step, jnp.zeros(rows.shape, jnp.float32), (parts, logits, firsts))
        return carry[0].at[at].set(nll), carry[1].at[at].set(hit), carry[2].at[at].set(slope)

    start = (jnp.zeros(wanted.shape, jnp.float32), jnp.zeros(wanted.shape, bool), jnp.zeros(hidden.shape, jnp.float32))
    nll, hit, slope = _fold(chunk, body, start, hidden, targets, wanted)
    return (nll, hit), (embedder, hidden, targets, wanted, slope)


def _token_nll_backward(
    chunk: int, kept: Kept, cotangents: tuple[jax.Array, Any]
) -> tuple[Embedder | None, jax.Array, None, None]:
    embedder, hidden, targets, wanted, slope = kept
    scale, _ = cotangents
    of_hidden = (slope * scale[:, None]).astype(hidden.dtype)
    if is_stored(embedder.table):
        return None, of_hidden, None, None
    parts, firsts = _parts(embedder)

    def body(total: jax.Array, at: jax.Array, rows: jax.Array, words: jax.Array) -> jax.Array:
        logits, weights = _logits(parts, rows), scale.at[at].get(mode="fill", fill_value=0)
        _, _, normalizer = _of_logits(logits, words)
        errors = jax.vmap(_error, in_axes=(0, None, 0))(logits, normalizer, words[None] - firsts[:, None])
        errors = (errors * weights[None, :, None]).astype(rows.dtype)
        return total + jnp.einsum("pnw,nd->pwd", errors, rows, preferred_element_type=jnp.float32)

    # A loop of its own: where the table is frozen nothing reads the result, and XLA drops it.
    total = _fold(chunk, body, jnp.zeros(parts.shape, jnp.float32), hidden, targets, wanted)
    return Embedder(total.reshape(embedder.table.shape).astype(embedder.table.dtype)), of_hidden, None, None


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def _parts(embedder: Embedder) -> tuple[Any, jax.Array]:
    """The table [v, d] as [parts, at most WORDS, d], in whatever form it is stored; the first word of each part."""
    words = jax.tree.leaves(embedder.table)[0].shape[0]
    count = next(count for count in range(-(-words // WORDS), words + 1) if words % count == 0)
    parts = jax.tree.map(lambda leaf: leaf.reshape(count, words // count, *leaf.shape[1:]), embedder.table)
    return parts, jnp.arange(count) * (words // count)


def _logits(parts: Any, rows: jax.Array) -> Float[Array, "p n w"]:
    """Float32 logits of some positions, for each part of the table."""
    return jax.lax.map(lambda part: read_out(part, rows), parts)


def _of_logits(logits: Float[Array, "p n w"], words: jax.Array) -> Triple:
    """Negative log-likelihood, whether no word is likelier, and the logarithm of the normaliser."""
    part, word = jnp.divmod(words, logits.shape[2])
    at_word = logits[part, jnp.arange(words.shape[0]), word]
    normalizer = jax.nn.logsumexp(logits, axis=(0, 2))
    return normalizer - at_word, at_word >= jnp.max(logits, axis=(0, 2)), normalizer


def _error(logits: Float[Array, "n w"], normalizer: jax.Array, words: jax.Array) -> Float[Array, "n w"]:
    """The gradient of the negative log-likelihood with respect to a part's logits; ``words`` counts from its first one."""
    return jnp.exp(logits - normalizer[:, None]) - jax.nn.one_hot(words, logits.shape[1])


def _fold(
    chunk: int,
    body: Callable[[T, jax.Array, jax.Array, jax.Array], T],
    start: T,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
) -> T:
    """``body(carry, positions, hidden there, targets there)`` over the wanted positions, ``chunk`` at a time.

    The last chunk is filled up with the position after the end, which writes drop (reads give the last row).
    """
    count = wanted.shape[0]
    positions = jnp.flatnonzero(wanted, size=count + -count % chunk, fill_value=count)

    def step(index: jax.Array, carry: T) -> T:
        at = jax.lax.dynamic_slice_in_dim(positions, index * chunk, chunk)
        return body(carry, at, hidden.at[at].get(mode="clip"), targets.at[at].get(mode="clip"))

    return jax.lax.fori_loop(0, (jnp.sum(wanted) + chunk - 1) // chunk, step, start)


def text_loss(
    embedder: Embedder, hidden: Float[Array, "b l d"], tokens: Int[Array, "b l"], loss_mask: Bool[Array, "b l"]
) -> tuple[Float[Array, " b"], Int[Array, " b"], Int[Array, " b"]]:
    """Per sample: mean cross-entropy of its target tokens (0 without any), hits, number of targets.

    The output at position t predicts token t+1; ``loss_mask`` marks targets.
    """
    wanted = loss_mask[:, 1:]
    flat = (hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1), wanted.reshape(-1))
    nll, hit = token_nll(embedder, *flat)
    count = jnp.sum(wanted, axis=1, dtype=jnp.int32)
    mean = jnp.sum(nll.reshape(wanted.shape), axis=1) / jnp.maximum(count, 1).astype(jnp.float32)
    return mean, jnp.sum(hit.reshape(wanted.shape), axis=1, dtype=jnp.int32), count


def sample_losses(model: Pi0Fuse, batch: Batch, flow: Flow, *, mask_padded_actions: bool = True) -> SampleLosses:
    """Both parts for every sample of a batch, given the noise and the times."""
    noisy, target = noisy_actions(flow, batch.actions)
    hidden, predicted = forward(model, batch.observation, noisy, flow.time, text_only=True)
    text, correct, targets = text_loss(model.embedder, hidden, batch.observation.tokens, batch.token_loss_mask)
    action = flow_matching_loss(predicted, target, batch.action_is_pad if mask_padded_actions else None)
    return SampleLosses(text, action * batch.diffusion_loss_mask.astype(jnp.float32), correct, targets)


def joint_loss(
    model: Pi0Fuse, batch: Batch, key: Key, *, coeff: float = 1.0, flow_draws: int = 1, mask_padded_actions: bool = True
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The batch loss and its metrics, see ``batch_loss``."""
    losses = sample_losses(model, batch, draw_flow(key, batch.actions, flow_draws), mask_padded_actions=mask_padded_actions)
    return batch_loss(losses, batch.diffusion_loss_mask, coeff)


def batch_loss(
    losses: SampleLosses, has_action: Bool[Array, " b"], coeff: float = 1.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss and the metrics of a batch, given its samples' losses and which of them train actions.

    ``text_loss`` and ``action_loss`` are means over the samples that have that part; ``token_accuracy`` is over all targets.
    """
    loss = jnp.mean(losses.text + coeff * losses.action)
    has_text = losses.targets > 0
    metrics: dict[str, Array] = {
        "loss": loss,
        "text_loss": _mean_where(losses.text, has_text),
        "action_loss": _mean_where(losses.action, has_action),
        "token_accuracy": _ratio(jnp.sum(losses.correct), jnp.sum(losses.targets)),
        "text_share": jnp.mean(has_text.astype(jnp.float32)),
        "action_share": jnp.mean(jnp.asarray(has_action).astype(jnp.float32)),
    }
    return loss, metrics


def _mean_where(values: Array, where: Array) -> Array:
    return _ratio(jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where))


def _ratio(total: Array, count: Array) -> Array:
    return total.astype(jnp.float32) / jnp.maximum(count.astype(jnp.float32), 1.0)
