"""Reasoning annotations (``cot_simple.json``): reading and checking them, and choosing the thought of a frame.

An episode of P plans has 2P + 1 segments, half-open in frames: think, act, think, ..., act, think. The first covers
``episode_start_interval``; the last one ends with the episode (``end_step`` -1). A *think* segment carries
``updated_content``, the thought that replaces ``content``; an *act* segment carries none.

Source: DESIGN section 5 ("Reasoning annotations", "Choosing the thought of a frame").
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from fusevla.data.annotation_schema import AnnotationError, check_document, length_defects
from fusevla.data.prompts import initial_content

__all__ = [
    "AnnotationError",
    "Annotations",
    "EpisodeAnnotation",
    "Kind",
    "Segment",
    "Thought",
    "act_only_prefix",
    "check_annotations",
    "choose_thought",
    "draw_pair",
    "load_annotations",
    "possible_thoughts",
    "think_probability",
]

Kind = Literal["reason", "reason_outdated", "act", "act_outdated"]
"""What a sample teaches. On an outdated thought: ``reason_outdated`` notices it, ``act_outdated`` acts all the same."""

REASON_PROBABILITY = (0.8, 0.4)
"""Chance of thinking at the start and at the end of a think segment."""
OUTDATED_REASON_PROBABILITY = (0.4, 0.0)
"""The same in an act segment that has an outdated thought."""
TRAIN_KEEP_REASON = 0.7
"""Share of thinking frames (outside the episode's start) that do think; the others act on the outdated thought."""
VALIDATION_KEEP_REASON = 1.0


@dataclasses.dataclass(frozen=True)
class Segment:
    """Frames ``start_step <= frame < end_step`` of one episode, and the texts that belong to them."""

    start_step: int
    end_step: int
    """Exclusive; -1 means the end of the episode."""
    reference_start_step: int
    reference_end_step: int
    content: str
    """The prompt: instruction and latest thought."""
    updated_content: str | None = None
    """The thought that is due here; None on act segments."""
    updated_content_w_instruction: str | None = None
    """The prompt after that thought."""
    outdated_content: str | None = None
    """A prompt whose thought no longer fits these frames."""
    outdated_reference_start_step: int | None = None
    outdated_reference_end_step: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Keys of the file that mean nothing here."""

    def end(self, length: int) -> int:
        """The exclusive end in an episode of ``length`` frames."""
        return length if self.end_step == -1 else self.end_step

    def contains(self, frame: int, length: int) -> bool:
        """Whether ``frame`` lies in the half-open interval."""
        return self.start_step <= frame < self.end(length)


@dataclasses.dataclass(frozen=True)
class EpisodeAnnotation:
    """The annotated segments of one episode, in order."""

    start_interval: tuple[int, int]
    """Half-open frames in which every thinking draw does think."""
    segments: tuple[Segment, ...]

    def segment_at(self, frame: int, length: int) -> Segment:
        """The segment of a frame.

        Raises:
            IndexError: the frame lies outside the episode or in no segment.
        """
        if 0 <= frame < length:
            for segment in self.segments:
                if segment.contains(frame, length):
                    return segment
        raise IndexError(f"frame: expected one of 0..{length - 1} inside a segment, got {frame}")


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Everything in one ``cot_simple.json``."""

    episodes: Mapping[int, EpisodeAnnotation]
    vision_language: frozenset[int] = frozenset()
    """Episodes that only teach thinking: their actions are never trained."""


@dataclasses.dataclass(frozen=True)
class Thought:
    """What one training sample says."""

    prefix: str
    target: str | None
    """The thought to write; None where the sample acts."""
    kind: Kind
    stay: bool = False
    """The actions are to be replaced by standing still with the last gripper command."""
    actions: bool = True
    """Whether the actions are trained."""


def load_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Reads and checks a ``cot_simple.json``.

    Raises:
        FileNotFoundError: no file there.
        AnnotationError: one message that lists every defect with file, episode, segment, what was expected and what is there.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"annotations: expected a cot_simple.json, found none at {file}; give its path, or train without reasoning "
            "(use_reasoning=False)"
        )
    document = check_document(file)
    vision_language = frozenset(document.pop("vision_language_episode_idx", ()))
    return Annotations({int(index): _episode(episode) for index, episode in document.items()}, vision_language)


def check_annotations(annotations: Annotations, lengths: Mapping[int, int], source: str = "annotations") -> None:
    """Checks annotations against the episodes of a set.

    Args:
        annotations: From ``load_annotations``.
        lengths: Frames per episode index, for the episodes that will be used; others may be annotated or not.
        source: The file's name, for the message.

    Raises:
        AnnotationError: one message with every episode that has no annotation or is too short for its segments.
    """
    steps = {
        index: [(segment.start_step, segment.end_step) for segment in episode.segments]
        for index, episode in annotations.episodes.items()
    }
    if defects := [*length_defects(steps, lengths)]:
        raise AnnotationError(source, defects)


def choose_thought(
    annotation: EpisodeAnnotation,
    frame: int,
    length: int,
    r1: float,
    r2: float,
    *,
    use_reasoning: bool = True,
    use_outdated_reasoning: bool = True,
    vision_language: bool = False,
    keep_reason: float = TRAIN_KEEP_REASON,
) -> Thought:
    """What the sample at ``frame`` says: a pure function, the randomness comes in as ``r1`` and ``r2``.

    Args:
        annotation: The episode's annotation.
        frame: Index in the episode.
        length: Frames of the episode.
        r1: Uniform in [0, 1): think or act.
        r2: Uniform in [0, 1): think, or act on the outdated thought; in a vision-language episode, which segment.
        use_reasoning: False: the prompt is the first segment's content, stripped, and every sample acts.
        use_outdated_reasoning: Whether act segments may show an outdated thought.
        vision_language: The episode only teaches thinking.
        keep_reason: ``r2`` below this thinks: ``TRAIN_KEEP_REASON`` or ``VALIDATION_KEEP_REASON``.

    Raises:
        IndexError: the frame is not in the episode.
    """
    if not use_reasoning:
        return Thought(act_only_prefix(annotation), None, "act", actions=not vision_language)
    if vision_language:
        return _random_reason(annotation, r2)
    segment = annotation.segment_at(frame, length)
    think = r1 < think_probability(annotation, frame, length, use_outdated_reasoning)
    if segment.updated_content is not None:
        in_start = annotation.start_interval[0] <= frame < annotation.start_interval[1]
        return _think(segment, think, in_start or r2 < keep_reason)
    if think and segment.outdated_content is not None:
        return Thought(segment.outdated_content, segment.content, "reason_outdated", actions=False)
    return Thought(segment.content, None, "act")


def think_probability(annotation: EpisodeAnnotation, frame: int, length: int, use_outdated_reasoning: bool = True) -> float:
    """The bound below which ``r1`` draws the thinking side of ``choose_thought`` at a frame. IndexError outside the episode."""
    segment = annotation.segment_at(frame, length)
    if segment.updated_content is not None:
        return _ramp(REASON_PROBABILITY, segment, frame, length)
    if segment.outdated_content is not None and use_outdated_reasoning:
        return _ramp(OUTDATED_REASON_PROBABILITY, segment, frame, length)
    return 0.0


def possible_thoughts(
    annotation: EpisodeAnnotation,
    *,
    use_reasoning: bool = True,
    use_outdated_reasoning: bool = True,
    vision_language: bool = False,
) -> set[Thought]:
    """Every thought that ``choose_thought`` can return for an episode: to measure lengths and to train tokenizers."""
    if not use_reasoning:
        return {Thought(act_only_prefix(annotation), None, "act", actions=not vision_language)}
    thoughts = set()
    for segment in annotation.segments:
        if segment.updated_content is not None:
            thoughts.add(_think(segment, True, True))
            if not vision_language:
                thoughts |= {_think(segment, True, False), _think(segment, False, False)}
        elif not vision_language:
            thoughts.add(Thought(segment.content, None, "act"))
            if segment.outdated_content is not None and use_outdated_reasoning:
                thoughts.add(Thought(segment.outdated_content, segment.content, "reason_outdated", actions=False))
    return thoughts


def draw_pair(seed: int, epoch: int, row: int) -> tuple[float, float]:
    """(r1, r2), uniform in [0, 1): a pure function of its arguments, so the same for any order and number of workers."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, row))))
    r1, r2 = generator.random(2)
    return float(r1), float(r2)


def act_only_prefix(annotation: EpisodeAnnotation | str) -> str:
    """The prompt without reasoning: the first content, stripped. Takes a task string where there is no annotation."""
    content = initial_content(annotation) if isinstance(annotation, str) else annotation.segments[0].content
    return content.strip()


def _think(segment: Segment, think: bool, keep: bool) -> Thought:
    """The thought of a think segment after its two decisions."""
    if think and keep:
        return Thought(segment.content, segment.updated_content, "reason", actions=False)
    if think:
        return Thought(segment.content, None, "act_outdated")
    return Thought(segment.updated_content_w_instruction or segment.content, None, "act", stay=segment.end_step == -1)


def _random_reason(annotation: EpisodeAnnotation, r2: float) -> Thought:
    thinking = [segment for segment in annotation.segments if segment.updated_content is not None]
    return _think(thinking[int(r2 * len(thinking))], True, True)


def _ramp(ends: tuple[float, float], segment: Segment, frame: int, length: int) -> float:
    """Linear from ``ends[0]`` at the segment's start to ``ends[1]`` at its exclusive end."""
    share = (frame - segment.start_step) / (segment.end(length) - segment.start_step)
    return ends[0] + (ends[1] - ends[0]) * share


def _episode(record: Mapping[str, Any]) -> EpisodeAnnotation:
    start, end = record["episode_start_interval"]
    return EpisodeAnnotation((start, end), tuple(_segment(segment) for segment in record["segments"]))


def _segment(record: Mapping[str, Any]) -> Segment:
    known = {field.name for field in dataclasses.fields(Segment)} - {"extra"}
    extra = {key: value for key, value in record.items() if key not in known}
    return Segment(**{key: value for key, value in record.items() if key in known}, extra=extra)
