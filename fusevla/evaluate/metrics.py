"""What a model is worth on episodes it has not seen: losses, whole thoughts, and sampled actions.

=========================== ===========================================================================================
``text_loss``               cross-entropy of the thoughts, teacher-forced; mean over reasoning samples
``token_accuracy``          share of the thoughts' tokens that are the argmax, teacher-forced
``act_decision_accuracy``   share of acting samples whose END_OF_PREFIX output says "act"
``action_loss``             flow-matching loss with fixed noise and times; mean over acting samples
``thought_exact``           share of thoughts that greedy decoding reproduces to the last character
``action_error_ratio``      squared error of *sampled* actions over that of always predicting the training mean
=========================== ===========================================================================================

Actions are compared as the model sees them (normalised), in their real dimensions and real steps only: padding never
enters a figure. Means over no sample are None.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusevla.arrays import Array, Batch, Bool, Float, Int, Key
from fusevla.data.batch import Sample, SampleSource, bucket_for, collate
from fusevla.data.normalize import normalize
from fusevla.losses import draw_flow, sample_losses
from fusevla.model.fuse import Pi0Fuse
from fusevla.policy.sampling import prefill, reason, sample_actions
from fusevla.tokens.tokenizer import Tokenizer
from fusevla.train.sharding import put_batch

Figures = dict[str, float | None]
SCANNED = 20_000
"""Frames looked at to find reasoning and acting ones."""
HELD_OUT_SEED = 0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Fixed samples of episodes that are not trained on."""

    reason: tuple[Sample, ...]
    act: tuple[Sample, ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All of them, reasoning ones first."""
        return self.reason + self.act


def _evenly(items: Sequence[T], limit: int) -> list[T]:
    if len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def pick_held_out(sources: Sequence[SampleSource], limit: int) -> HeldOut:
    """Up to ``limit`` reasoning and ``limit`` acting samples, spread evenly over the frames of all sets; always the same ones.

    A thought is compared only where it is the right one for its frame: prompts that are outdated are left out.
    """
    reasons, acts = [], []
    for source, index in _evenly([(one, index) for one in sources for index in range(len(one))], SCANNED):
        thought = source.thought(index, 0, HELD_OUT_SEED)
        if thought.kind == "reason":
            reasons.append((source, index))
        elif thought.actions:
            acts.append((source, index))
    make = lambda drawn: tuple(source(index, 0, HELD_OUT_SEED) for source, index in _evenly(drawn, limit))
    return HeldOut(make(reasons), make(acts))


def training_mean(sources: Sequence[SampleSource]) -> Float[np.ndarray, " a"]:
    """Mean of the normalised actions over the frames that train them, in their real dimensions; zero without any."""
    actions = np.concatenate([np.asarray(source.frames.actions[source.acting_rows], np.float32) for source in sources])
    stats = sources[0].stats
    normalized = actions if stats is None else normalize(actions, stats["actions"])
    return normalized.sum(axis=0) / max(len(actions), 1)


class _Sums(eqx.Module):
    """Per-sample results of the teacher-forced pass."""

    text: Float[Array, " b"]
    action: Float[Array, " b"]
    correct: Int[Array, " b"]
    targets: Int[Array, " b"]


def _losses(trainable: Pi0Fuse, frozen: Pi0Fuse, batch: Batch, key: Key) -> _Sums:
    model = eqx.combine(trainable, frozen)
    losses = sample_losses(model, batch, draw_flow(key, batch.actions, 4))
    return _Sums(losses.text, losses.action, losses.correct, losses.targets)


def _decode(trainable: Pi0Fuse, frozen: Pi0Fuse, batch: Batch, max_new_tokens: int) -> Int[Array, "b t"]:
    model = eqx.combine(trainable, frozen)
    state = prefill(model, batch.observation, reserve=max_new_tokens + 1)
    return reason(model, state, max_new_tokens)[0].tokens


def _sample(trainable: Pi0Fuse, frozen: Pi0Fuse, batch: Batch, key: Key, num_steps: int) -> Float[Array, "b h a"]:
    model = eqx.combine(trainable, frozen)
    noise = jax.random.normal(key, (batch.actions.shape[0], 1, *batch.actions.shape[1:]), jnp.float32)
    return sample_actions(model, batch.observation, noise, num_steps)[:, 0]


class Evaluator:
    """Figures of a model on fixed samples. Everything is jitted once, at one batch size and one text length."""

    def __init__(
        self,
        held_out: HeldOut,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        text_buckets: Sequence[int],
        mean_action: Float[np.ndarray, " a"],
        num_steps: int = 10,
        batch_size: int = 16,
    ):
        """``mean_action`` is the baseline and says how many dimensions are real; ``num_steps`` the sampler's steps."""
        self.held_out, self._tokenizer, self._mesh, self._mean = held_out, tokenizer, mesh, mean_action
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        lengths = [len(sample.text.tokens) for sample in held_out.samples] or [1]
        self._bucket = bucket_for(max(lengths), text_buckets)
        thoughts = [int(sample.text.ar_mask.sum()) for sample in held_out.reason] or [1]
        self._max_new_tokens = max(thoughts) + 8
        self._losses = jax.jit(_losses)
        self._decode = jax.jit(_decode, static_argnums=3)
        self._sample = jax.jit(_sample, static_argnums=4)
        self._num_steps = num_steps

    def _batches(self, samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], Batch]]:
        for start in range(0, len(samples), self._batch_size):
            real = samples[start : start + self._batch_size]
            filled = [*real, *[real[-1]] * (self._batch_size - len(real))]
            yield real, put_batch(collate(filled, [self._bucket]), self._mesh)

    def losses(self, trainable: Pi0Fuse, frozen: Pi0Fuse) -> Figures:
        """The teacher-forced figures."""
        key = jax.random.key(HELD_OUT_SEED)
        sums = {name: self._collect(part, trainable, frozen, key) for name, part in self._parts().items()}
        thought, act = sums["reason"], sums["act"]
        return {
            "text_loss": _mean(thought["text"]),
            "token_accuracy": _ratio(thought["correct"].sum(), thought["targets"].sum()),
            "act_decision_accuracy": _ratio(act["correct"].sum(), act["targets"].sum()),
            "action_loss": _mean(act["action"]),
        }

    def _parts(self) -> dict[str, tuple[Sample, ...]]:
        return {"reason": self.held_out.reason, "act": self.held_out.act}

    def _collect(self, samples: Sequence[Sample], trainable: Pi0Fuse, frozen: Pi0Fuse, key: Key) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {field.name: [] for field in dataclasses.fields(_Sums)}
        for number, (real, batch) in enumerate(self._batches(samples)):
            sums = jax.device_get(self._losses(trainable, frozen, batch, jax.random.fold_in(key, number)))
            for name in found:
                found[name].append(getattr(sums, name)[: len(real)])
        return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in found.items()}

    def thoughts(self, trainable: Pi0Fuse, frozen: Pi0Fuse) -> list[tuple[str, str]]:
        """(wanted, written) text of every reasoning sample, decoded greedily from its prompt."""
        pairs = []
        for real, batch in self._batches(self.held_out.reason):
            tokens = jax.device_get(self._decode(trainable, frozen, batch, self._max_new_tokens))
            written = [self._tokenizer.decode(until_eos(row, self._tokenizer.ids.eos)) for row in tokens]
            pairs += [(cast(str, sample.thought.target), text) for sample, text in zip(real, written)]
        return pairs

    def action_error_ratio(self, trainable: Pi0Fuse, frozen: Pi0Fuse) -> float | None:
        """Squared error of sampled actions over that of the training mean; 0 is perfect, 1 is no better than the mean."""
        key = jax.random.key(HELD_OUT_SEED)
        error = baseline = 0.0
        for number, (real, batch) in enumerate(self._batches(self.held_out.act)):
            draws = self._sample(trainable, frozen, batch, jax.random.fold_in(key, number), self._num_steps)
            wanted = np.stack([sample.actions for sample in real])
            is_pad = np.stack([sample.action_is_pad for sample in real])
            sampled = np.asarray(jax.device_get(draws))[: len(real)]
            error += squared_error(sampled, wanted, is_pad, len(self._mean))
            baseline += squared_error(np.broadcast_to(self._padded_mean(wanted), wanted.shape), wanted, is_pad, len(self._mean))
        return _ratio(error, baseline)

    def _padded_mean(self, like: np.ndarray) -> np.ndarray:
        return np.pad(self._mean, (0, like.shape[-1] - len(self._mean)))

    def all_figures(self, trainable: Pi0Fuse, frozen: Pi0Fuse) -> Figures:
        """Losses, whole thoughts and sampled actions."""
        pairs = self.thoughts(trainable, frozen)
        exact = _ratio(sum(wanted == written for wanted, written in pairs), len(pairs))
        ratio = self.action_error_ratio(trainable, frozen)
        return {**self.losses(trainable, frozen), "thought_exact": exact, "action_error_ratio": ratio}


def squared_error(
    predicted: Float[np.ndarray, "b h a"], wanted: Float[np.ndarray, "b h a"], is_pad: Bool[np.ndarray, "b h"], dims: int
) -> float:
    """Summed over real steps and the first ``dims`` dimensions."""
    error = np.square(predicted[..., :dims].astype(np.float64) - wanted[..., :dims]).sum(axis=-1)
    return float(error[~is_pad].sum())


def until_eos(tokens: Int[np.ndarray, " t"], eos: int) -> list[int]:
    """The ids before the first EOS."""
    ids = tokens.tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None
