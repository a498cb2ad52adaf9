"""How often each thought of a set is drawn per epoch: exactly, from the rules that draw it."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from fusevla.data.annotations import (
    TRAIN_KEEP_REASON,
    Annotations,
    EpisodeAnnotation,
    Segment,
    Thought,
    choose_thought,
    think_probability,
)
from fusevla.data.lerobot import Episode

__all__ = ["expected_thoughts"]

ALMOST_ONE = float(np.nextafter(1.0, 0.0))
"""The largest draw: above every probability below 1."""


def expected_thoughts(
    episodes: Iterable[Episode],
    annotations: Annotations,
    keep_reason: float = TRAIN_KEEP_REASON,
    use_outdated_reasoning: bool = True,
) -> dict[Thought, float]:
    """Expected number of samples of each thought in one epoch (``choose_thought`` with uniform draws at every frame)."""
    expected: dict[Thought, float] = defaultdict(float)
    for episode in episodes:
        annotation = annotations.episodes[episode.index]
        if episode.index in annotations.vision_language:
            shares = _random(annotation, episode.length)
        else:
            shares = _drawn(annotation, episode.length, keep_reason, use_outdated_reasoning)
        for thought, count in shares:
            expected[thought] += count
    return {thought: count for thought, count in expected.items() if count > 0}


def _random(annotation: EpisodeAnnotation, length: int) -> Iterator[tuple[Thought, float]]:
    """A vision-language episode thinks in one of its think segments, whatever the frame."""
    count = sum(segment.updated_content is not None for segment in annotation.segments)
    for k in range(count):
        yield choose_thought(annotation, 0, length, 0.0, (k + 0.5) / count, vision_language=True), length / count


def _drawn(annotation: EpisodeAnnotation, length: int, keep: float, outdated: bool) -> Iterator[tuple[Thought, float]]:
    """Within a part the choice depends on the frame only through a probability that is linear in it: its mean is enough."""
    for part in (part for segment in annotation.segments for part in _parts(segment, annotation.start_interval, length)):
        p = sum(think_probability(annotation, frame, length, outdated) for frame in (part[0], part[-1])) / 2
        for r1, share1 in ((0.0, p), (ALMOST_ONE, 1 - p)):
            for r2, share2 in ((0.0, keep), (ALMOST_ONE, 1 - keep)):
                thought = choose_thought(annotation, part[0], length, r1, r2, use_outdated_reasoning=outdated, keep_reason=keep)
                yield thought, len(part) * share1 * share2


def _parts(segment: Segment, interval: tuple[int, int], length: int) -> Iterator[range]:
    """The segment's frames, cut where the episode's start interval begins and ends."""
    start, end = segment.start_step, min(segment.end(length), length)
    cuts = [start, *sorted(min(max(cut, start), end) for cut in interval), end]
    yield from (range(low, high) for low, high in itertools.pairwise(cuts) if high > low)
