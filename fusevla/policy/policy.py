"""A trained model as something that answers robots: observations in, thoughts or actions out, many agents in one batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Array, Bool, Float, Observation, UInt8
from fusevla.data.batch import bucket_for, collate
from fusevla.data.normalize import stats_from_json, unnormalize
from fusevla.data.samples import Sample, Stats, prompt_sample
from fusevla.model.fuse import Pi0Fuse
from fusevla.policy import sampling
from fusevla.policy.agent import Agent
from fusevla.presets import Preset
from fusevla.tokens.tokenizer import Tokenizer
from fusevla.train.checkpoint import RunInfo

__all__ = ["Answers", "Policy", "Query", "Reply", "policy_of"]


@dataclasses.dataclass(frozen=True)
class Query:
    """One agent's question."""

    agent: Agent
    images: Mapping[str, UInt8[np.ndarray, "h w 3"] | None]
    """By camera, any size; missing cameras are masked."""
    state: Float[np.ndarray, " a"]
    """As the robot gives it."""
    seed: tuple[int, ...] = (0,)
    """Of the noise that actions start from: the answer depends on nothing else in the batch."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A thought, or a chunk of actions [horizon, dimensions] in the robot's units; and the agent from now on."""

    agent: Agent
    thought: str | None = None
    actions: Float[np.ndarray, "h a"] | None = None


@runtime_checkable
class Answers(Protocol):
    """Whatever answers a round of queries, at most ``batch_size`` of them: a ``Policy``, or a script in its place."""

    batch_size: int

    def __call__(self, queries: Sequence[Query]) -> list[Reply]:
        """One reply for each query, in order."""
        ...


class Policy:
    """Answers up to ``batch_size`` queries in one pass; compiled once per text length (``text_buckets`` of the preset)."""

    def __init__(
        self,
        model: Pi0Fuse,
        preset: Preset,
        tokenizer: Tokenizer,
        stats: Stats | None,
        *,
        batch_size: int = 1,
        max_new_tokens: int = sampling.MAX_NEW_TOKENS,
    ):
        """``stats`` are those of training (None: raw values); ``max_new_tokens`` bounds a thought, its marks included."""
        self.preset, self.tokenizer, self.stats = preset, tokenizer, stats
        self.batch_size, self._model = batch_size, model
        self._prefill = jax.jit(partial(sampling.prefill, reserve=max_new_tokens + 1))
        self._reason = jax.jit(partial(_reason, max_new_tokens=max_new_tokens))
        self._act = jax.jit(partial(sampling.act, num_steps=preset.num_steps))

    def __call__(self, queries: Sequence[Query]) -> list[Reply]:
        """One round: every agent thinks once or acts.

        Raises:
            ValueError: no query, more than ``batch_size``, or an observation that does not fit the preset.
        """
        if not 0 < len(queries) <= self.batch_size:
            raise ValueError(f"policy: expected 1 to {self.batch_size} queries, got {len(queries)}")
        state = self._prefill(self._model, self._observation(queries))
        decisions = np.asarray(jax.device_get(state.decision))
        thinks = [query.agent.decide(logits) == "reason" for query, logits in zip(queries, decisions, strict=False)]
        thoughts = self._thoughts(state, thinks) if any(thinks) else []
        actions = np.zeros(0) if all(thinks) else self._actions(state, queries)
        written = iter(thoughts)
        return [
            _thinking(query.agent, *next(written)) if think else Reply(query.agent.after_action(), actions=actions[i])
            for i, (query, think) in enumerate(zip(queries, thinks, strict=True))
        ]

    def _observation(self, queries: Sequence[Query]) -> Observation:
        data, model = self.preset.data, self.preset.model
        samples: list[Sample] = [
            prompt_sample(q.images, q.state, q.agent.prompt, self.tokenizer, self.stats, data, model) for q in queries
        ]
        samples += samples[-1:] * (self.batch_size - len(samples))
        bucket = bucket_for(max(len(sample.text.tokens) for sample in samples), data.text_buckets)
        return collate(samples, [bucket]).observation

    def _thoughts(self, state: sampling.Prefilled, thinks: Sequence[bool]) -> list[tuple[str, bool]]:
        """(text, came to an end) of those that think."""
        active = np.zeros(self.batch_size, bool)
        active[: len(thinks)] = thinks
        found = jax.device_get(self._reason(self._model, state, active))
        return [(self.tokenizer.decode(found.tokens[i]), bool(found.finished[i])) for i in np.flatnonzero(active)]

    def _actions(self, state: sampling.Prefilled, queries: Sequence[Query]) -> Float[np.ndarray, "b h a"]:
        shape = (1, self.preset.model.action_horizon, self.preset.model.action_dim)
        noise = np.zeros((self.batch_size, *shape), np.float32)
        for i, query in enumerate(queries):
            noise[i] = np.random.default_rng(query.seed).standard_normal(shape, np.float32)
        chunks = np.asarray(jax.device_get(self._act(self._model, state, jnp.asarray(noise))))[:, 0]
        if self.stats is None:
            return chunks
        stats = self.stats["actions"]
        return unnormalize(chunks[..., : len(stats.mean)], stats)


def _thinking(agent: Agent, text: str, finished: bool) -> Reply:
    return Reply(agent.after_thought(text, finished), thought=text)


def _reason(model: Pi0Fuse, state: sampling.Prefilled, active: Bool[Array, " b"], *, max_new_tokens: int) -> sampling.Reasoned:
    return sampling.reason(model, state, max_new_tokens, active=active)[0]


def policy_of(model: Pi0Fuse, info: RunInfo, *, batch_size: int = 1, max_new_tokens: int = sampling.MAX_NEW_TOKENS) -> Policy:
    """The policy of a run's checkpoint (``fusevla.policy.load`` reads model and info)."""
    tokenizer = Tokenizer(info.tokenizer, info.preset.model.vocab_size)
    stats = None if info.norm_stats is None else stats_from_json(info.norm_stats)
    return Policy(model, info.preset, tokenizer, stats, batch_size=batch_size, max_new_tokens=max_new_tokens)
