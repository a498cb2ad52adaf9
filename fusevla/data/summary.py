"""The numbers of a prepared set: what is in it, what an epoch teaches, and what tokens and bins will lose."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusevla.data.annotations import Annotations, Segment, Thought
from fusevla.data.expected import expected_thoughts
from fusevla.data.lerobot import Episode, LeRobotSet
from fusevla.data.normalize import NormStats, degenerate, normalize
from fusevla.data.text_report import full_length
from fusevla.tokens.tokenizer import Tokenizer

__all__ = ["segment_kind", "summarize"]

HISTOGRAM_STEP = 16


def summarize(
    frames: LeRobotSet,
    episodes: Sequence[Episode],
    annotations: Annotations,
    stats: Mapping[str, NormStats],
    tokenizer: Tokenizer,
    max_token_len: int,
) -> dict[str, Any]:
    """Everything the report shows but the episodes themselves, ready for JSON. ``episodes`` are those that are used."""
    expected = expected_thoughts(episodes, annotations)
    return {
        "version": frames.version,
        "fps": frames.fps,
        "episodes": len(episodes),
        "frames": sum(episode.length for episode in episodes),
        "vision_language_episodes": len(annotations.vision_language & {episode.index for episode in episodes}),
        "cameras": dict(frames.cameras),
        "tasks": _tasks(episodes),
        "segments": _segments(episodes, annotations),
        "samples_per_epoch": _samples(expected),
        "text": _text(expected, tokenizer, frames.state.shape[1], max_token_len),
        "state": _bins(frames, stats["state"]),
        "degenerate_dimensions": {name: np.flatnonzero(degenerate(entry)).tolist() for name, entry in stats.items()},
    }


def _tasks(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    lengths: dict[str, list[int]] = defaultdict(list)
    for episode in episodes:
        lengths[episode.task].append(episode.length)
    return [{"task": task, "episodes": len(found), "frames": sum(found)} for task, found in sorted(lengths.items())]


def segment_kind(segment: Segment) -> str:
    """``think``, ``act``, or ``act, outdated thought`` where the frames can also be shown an outdated one."""
    if segment.updated_content is not None:
        return "think"
    return "act" if segment.outdated_content is None else "act, outdated thought"


def _segments(episodes: Sequence[Episode], annotations: Annotations) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for episode in episodes:
        for segment in annotations.episodes[episode.index].segments:
            entry = counts.setdefault(segment_kind(segment), {"segments": 0, "frames": 0})
            entry["segments"] += 1
            entry["frames"] += max(0, segment.end(episode.length) - segment.start_step)
    return counts


def _samples(expected: Mapping[Thought, float]) -> dict[str, Any]:
    """Expected samples by kind, and the shares of those that reason, act and stay."""
    kinds: dict[str, float] = {"reason": 0.0, "reason_outdated": 0.0, "act": 0.0, "act_outdated": 0.0}
    for thought, count in expected.items():
        kinds[thought.kind] += count
    total = sum(kinds.values())
    reason = kinds["reason"] + kinds["reason_outdated"]
    stay = sum(count for thought, count in expected.items() if thought.stay)
    shares = {"reason": reason / total, "act": 1 - reason / total, "stay": stay / total}
    return {"expected": {kind: round(count, 3) for kind, count in kinds.items()}, "share": _rounded(shares)}


def _text(expected: Mapping[Thought, float], tokenizer: Tokenizer, state_dim: int, limit: int) -> dict[str, Any]:
    """Lengths as expected over an epoch, each with the state at its widest (three digits in every dimension)."""
    lengths = {thought: full_length(tokenizer, thought, state_dim) for thought in expected}
    longest = max(lengths.values())
    edges = list(range(0, max(longest, limit) + HISTOGRAM_STEP, HISTOGRAM_STEP))
    counts, _ = np.histogram([*lengths.values()], bins=edges, weights=[expected[thought] for thought in lengths])
    over = [thought for thought, length in lengths.items() if length > limit]
    by_kind: dict[str, int] = {}
    for thought, length in lengths.items():
        by_kind[thought.kind] = max(by_kind.get(thought.kind, 0), length)
    return {
        "vocab_size": tokenizer.vocab_size,
        "max_token_len": limit,
        "distinct_thoughts": len(lengths),
        "longest": by_kind,
        "histogram": {"edges": edges, "samples": [round(float(count), 3) for count in counts]},
        "thoughts_over_limit": len(over),
        "share_over_limit": round(sum(expected[thought] for thought in over) / sum(expected.values()), 6),
    }


def _bins(frames: LeRobotSet, stats: NormStats) -> dict[str, Any]:
    """How much of each state dimension the 256 bins over [-1, 1] clip, after normalisation with these statistics."""
    outside = np.abs(normalize(frames.state, stats)) > 1
    shares = outside.mean(axis=0)
    return {"clipped_share": [round(float(share), 6) for share in shares], "clipped_values": int(outside.sum())}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}
