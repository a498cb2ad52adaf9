"""The joint loss as pure functions: cross-entropy on reasoning tokens + flow matching on actions.

``L = L_text + coeff * L_action`` (Wu et al. 2025, arXiv 2510.16281). Each part is a mean within its sample, the batch loss a
mean over samples.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Batch, Bool, Float, Int, Key
from fusevla.model.fuse import Pi0Fuse, forward
from fusevla.model.layers import Embedder

CHUNK = 512
"""Positions whose logits exist at the same time: 512 x 257,152 float32 logits are 527 MB."""


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
    """Negative log-likelihood and argmax hit of each *wanted* position; zero and False elsewhere.

    Exact for any number of wanted positions. They are moved to the front, and a scan takes ``chunk`` of them at a time, so
    that neither pass ever holds more than ``chunk`` x vocabulary logits; chunks with nothing wanted are skipped.
    """
    targets, wanted = jnp.asarray(targets), jnp.asarray(wanted)  # NumPy cannot be indexed by a tracer
    chunk = min(chunk, targets.shape[0])
    order = jnp.argsort(jnp.logical_not(wanted), stable=True)
    padded = jnp.pad(order, (0, -order.shape[0] % chunk), mode="edge").reshape(-1, chunk)
    fresh = (jnp.arange(padded.size) < order.shape[0]).reshape(padded.shape)

    def of_chunk(index: Array, use: Array) -> tuple[Array, Array]:
        logits = embedder.unembed(hidden[index])
        at_target = jnp.take_along_axis(logits, targets[index][:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - at_target
        return jnp.where(use, nll, 0.0), use & (jnp.argmax(logits, axis=1) == targets[index])

    def skip(index: Array, use: Array) -> tuple[Array, Array]:
        return jnp.zeros(index.shape, jnp.float32), jnp.zeros(index.shape, bool)

    def step(carry: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        index, use = part
        return carry, jax.lax.cond(jnp.any(use), jax.checkpoint(of_chunk), skip, index, use)

    _, (nll, hit) = jax.lax.scan(step, None, (padded, wanted[padded] & fresh))
    count = order.shape[0]
    return (
        jnp.zeros(count, jnp.float32).at[order].set(nll.reshape(-1)[:count]),
        jnp.zeros(count, bool).at[order].set(hit.reshape(-1)[:count]),
    )


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
    hidden, predicted = forward(model, batch.observation, noisy, flow.time)
    of_text = hidden[:, -batch.observation.tokens.shape[1] :]
    text, correct, targets = text_loss(model.embedder, of_text, batch.observation.tokens, batch.token_loss_mask)
    action = flow_matching_loss(predicted, target, batch.action_is_pad if mask_padded_actions else None)
    return SampleLosses(text, action * batch.diffusion_loss_mask.astype(jnp.float32), correct, targets)


def joint_loss(
    model: Pi0Fuse, batch: Batch, key: Key, *, coeff: float = 1.0, flow_draws: int = 1, mask_padded_actions: bool = True
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The batch loss and its metrics.

    ``text_loss`` and ``action_loss`` are means over the samples that have that part; ``token_accuracy`` is over all targets.
    """
    losses = sample_losses(model, batch, draw_flow(key, batch.actions, flow_draws), mask_padded_actions=mask_padded_actions)
    loss = jnp.mean(losses.text + coeff * losses.action)
    has_text, has_action = losses.targets > 0, batch.diffusion_loss_mask
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
