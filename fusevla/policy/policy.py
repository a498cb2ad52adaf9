"""A trained model as something that answers robots: observations in, thoughts or actions out, many agents in one batch."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Float, Observation, UInt8
from fusevla.data.batch import bucket_for, collate
from fusevla.data.normalize import stats_from_json, unnormalize
from fusevla.data.samples import Sample, Stats, prompt_sample
from fusevla.model.fuse import Pi0Fuse, merge_lora
from fusevla.policy import sampling
from fusevla.policy.agent import Agent
from fusevla.presets import Preset
from fusevla.tokens.tokenizer import Tokenizer
from fusevla.train.checkpoint import RunInfo
from fusevla.train.freeze import cast_leaves

__all__ = ["Answers", "Policy", "Query", "Reply", "merged", "policy_of"]

PIECE: Final = 8
"""Tokens of a thought between two looks at what else there is to do: what an acting robot may have to wait for."""


@dataclasses.dataclass(frozen=True)
class Query:
    """One agent's question."""

    agent: Agent
    images: Mapping[str, UInt8[np.ndarray, "h w 3"] | None]
    """By camera, any size; missing cameras are masked."""
    state: Float[np.ndarray, " a"]
    """As the robot gives it."""
    seed: tuple[int, ...] = (0,)
    """Of what is drawn: the answer depends on nothing else in the batch."""


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
    """Answers up to ``batch_size`` queries in one pass; compiled once per text length (``text_buckets`` of the preset).

    A call is a whole round. For those who cannot wait for the longest thought there are its parts: ``act`` and ``think``.
    """

    def __init__(
        self,
        model: Pi0Fuse,
        preset: Preset,
        tokenizer: Tokenizer,
        stats: Stats | None,
        *,
        batch_size: int = 1,
        smaller: Sequence[int] = (),
        max_new_tokens: int = sampling.MAX_NEW_TOKENS,
        temperature: float = 0.0,
    ):
        """``stats`` are those of training (None: raw values).

        Args:
            batch_size: Of a pass; fewer queries are padded to it, or to one of the ``smaller`` sizes.
            max_new_tokens: Bounds a thought, its marks included.
            temperature: Of thoughts, which are drawn with the queries' seeds; 0 is greedy.
        """
        self.preset, self.tokenizer, self.stats = preset, tokenizer, stats
        self.batch_size, self._model = batch_size, model
        self._sizes = sorted({*smaller, batch_size})
        self._prefill = jax.jit(partial(sampling.prefill, reserve=max_new_tokens + 1))
        self._begin = jax.jit(partial(sampling.begin_text, max_new_tokens=max_new_tokens))
        self._continue = jax.jit(partial(sampling.continue_text, steps=PIECE, temperature=temperature))
        self._act = jax.jit(partial(sampling.act, num_steps=preset.num_steps))
        self._times = jax.jit(partial(sampling.euler_times, num_steps=preset.num_steps))(model)

    def __call__(self, queries: Sequence[Query]) -> list[Reply]:
        """One round: every agent thinks once or acts.

        Raises:
            ValueError: no query, more than ``batch_size``, or an observation that does not fit the preset.
        """
        state, thinks = self._see(queries)
        replies = self._actions(state, queries, thinks)
        for written in self._thoughts(state, queries, thinks) if any(thinks) else ():
            replies |= written
        return [replies[i] for i in range(len(queries))]

    def act(self, queries: Sequence[Query]) -> dict[int, Reply | None]:
        """By index: actions, or None for who would rather ``think``. Raises as a call does."""
        state, thinks = self._see(queries)
        return dict.fromkeys(np.flatnonzero(thinks).tolist()) | self._actions(state, queries, thinks)

    def think(self, queries: Sequence[Query]) -> Iterator[dict[int, Reply]]:
        """A thought for every query, by index, as each comes to its end; piece by piece. Raises as a call does."""
        state, _ = self._see(queries)
        yield from self._thoughts(state, queries, [True] * len(queries))

    def _see(self, queries: Sequence[Query]) -> tuple[sampling.Prefilled, list[bool]]:
        """What everybody sees, encoded, and who thinks."""
        if not 0 < len(queries) <= self.batch_size:
            raise ValueError(f"policy: expected 1 to {self.batch_size} queries, got {len(queries)}")
        state = self._prefill(self._model, self._observation(queries))
        decisions = np.asarray(jax.device_get(state.decision))
        return state, [query.agent.decide(logits) == "reason" for query, logits in zip(queries, decisions, strict=False)]

    def _observation(self, queries: Sequence[Query]) -> Observation:
        data, model = self.preset.data, self.preset.model
        samples: list[Sample] = [
            prompt_sample(q.images, q.state, q.agent.prompt, self.tokenizer, self.stats, data, model) for q in queries
        ]
        size = next(size for size in self._sizes if len(samples) <= size)
        samples += samples[-1:] * (size - len(samples))
        bucket = bucket_for(max(len(sample.text.tokens) for sample in samples), data.text_buckets)
        return collate(samples, [bucket]).observation

    def _thoughts(
        self, state: sampling.Prefilled, queries: Sequence[Query], thinks: Sequence[bool]
    ) -> Iterator[dict[int, Reply]]:
        """Of those that think, by index; after every ``PIECE`` tokens those that have come to their ends."""
        active, seeds = np.zeros(len(state.length), bool), np.zeros(len(state.length), np.int32)
        active[: len(thinks)] = thinks
        seeds[: len(queries)] = [np.random.default_rng(query.seed).integers(2**31) for query in queries]
        text, waiting = self._begin(self._model, state, active=active), set(np.flatnonzero(active).tolist())
        while waiting:
            text = self._continue(self._model, text, seeds=seeds)
            step, done = jax.device_get((text.step, text.done))
            ended = {i for i in waiting if done[i] or step == text.tokens.shape[1]}
            tokens = jax.device_get(text.tokens) if ended else np.zeros(0)
            yield {i: _thinking(queries[i].agent, self.tokenizer.decode(tokens[i]), bool(done[i])) for i in sorted(ended)}
            waiting -= ended

    def _actions(self, state: sampling.Prefilled, queries: Sequence[Query], thinks: Sequence[bool]) -> dict[int, Reply]:
        """Of those that act, by index."""
        if all(thinks):
            return {}
        shape = (1, self.preset.model.action_horizon, self.preset.model.action_dim)
        noise = np.zeros((len(state.length), *shape), np.float32)
        for i, query in enumerate(queries):
            noise[i] = np.random.default_rng(query.seed).standard_normal(shape, np.float32)
        chunks = np.asarray(jax.device_get(self._act(self._model, state, jnp.asarray(noise), times=self._times)))[:, 0]
        if self.stats is not None:
            stats = self.stats["actions"]
            chunks = unnormalize(chunks[..., : len(stats.mean)], stats)
        return {i: Reply(queries[i].agent.after_action(), actions=chunks[i]) for i, think in enumerate(thinks) if not think}


def _thinking(agent: Agent, text: str, finished: bool) -> Reply:
    return Reply(agent.after_thought(text, finished), thought=text)


def policy_of(model: Pi0Fuse, info: RunInfo, *, merge: bool = True, max_new_tokens: int | None = None, **options: Any) -> Policy:
    """The policy of a run's checkpoint (``fusevla.policy.load`` reads model and info).

    Args:
        model, info: What was trained.
        merge: Add the adapters to their weights, which is quicker (``merged``).
        max_new_tokens: By default as many as training's texts have: a longer thought would not fit the next prompt.
        options: Of ``Policy``.
    """
    tokenizer = Tokenizer(info.tokenizer, info.preset.model.vocab_size)
    stats = None if info.norm_stats is None else stats_from_json(info.norm_stats)
    limit = min(sampling.MAX_NEW_TOKENS, info.preset.data.max_token_len) if max_new_tokens is None else max_new_tokens
    model = jax.jit(merged)(model) if merge else model
    return Policy(model, info.preset, tokenizer, stats, max_new_tokens=limit, **options)


def merged(model: Pi0Fuse) -> Pi0Fuse:
    """The model without adapters, as exact as it computes.

    Experts that compute in float32 get float32 weights first: frozen ones are stored in bfloat16, which would round what the
    adapters add. Where bfloat16 is computed, that rounding is one more of many.
    """
    if model.config.dtype == "float32":
        exact = cast_leaves((model.language, model.action), jnp.float32)
        model = dataclasses.replace(model, language=exact[0], action=exact[1])
    return merge_lora(model)
