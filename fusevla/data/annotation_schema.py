"""Checks of ``cot_simple.json``: every defect is found before the first one is reported."""

import collections
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["AnnotationError", "check_document", "document_steps", "inspect_document", "length_defects"]

_FOREIGN = ("possible_contents", "user_answer", "user_intervention")
"""Keys (beginnings of keys) of OneTwoVLA's schema, which reads the same file with another meaning."""
_STEPS = ("start_step", "end_step", "reference_start_step", "reference_end_step")
_OPTIONAL_STEPS = ("outdated_reference_start_step", "outdated_reference_end_step")
_OPTIONAL_TEXTS = ("updated_content", "updated_content_w_instruction", "outdated_content")


class AnnotationError(ValueError):
    """A file of annotations that cannot be used; ``defects`` lists everything that is wrong with it."""

    def __init__(self, source: object, defects: Sequence[str]):
        self.source, self.defects = source, tuple(defects)
        plural = "" if len(self.defects) == 1 else "s"
        super().__init__(f"{source}: {len(self.defects)} defect{plural}\n" + "\n".join(f"  {source}: {d}" for d in self.defects))

    def __reduce__(self) -> tuple[type["AnnotationError"], tuple[object, tuple[str, ...]]]:
        return AnnotationError, (self.source, self.defects)


def check_document(file: pathlib.Path) -> dict[str, Any]:
    """The parsed file, when nothing is wrong with it.

    Raises:
        AnnotationError: not JSON, or any defect of the schema.
    """
    document, defects = inspect_document(file)
    if defects:
        raise AnnotationError(file, defects)
    return document


def inspect_document(file: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """The parsed file (empty where it is no JSON object) and everything that is wrong with it."""
    duplicates: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(name for name, _ in pairs)
        duplicates.extend(sorted(name for name, count in counts.items() if count > 1))
        return dict(pairs)

    try:
        document = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=as_dict)
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"expected JSON in UTF-8, got {error}"]
    if not isinstance(document, dict):
        return {}, [_defect("document", "an object of episodes", document)]
    defects = [f"expected every key once in an object, got {name!r} more than once" for name in duplicates]
    return document, defects + _document_defects(document)


def document_steps(document: Mapping[str, Any]) -> dict[int, list[tuple[int, int]]]:
    """(start_step, end_step) of each segment by episode, whatever else is wrong; (0, 0) for a segment without them."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for key, episode in document.items():
        if not [*_key_defects(key)]:
            segments = episode.get("segments") if isinstance(episode, dict) else None
            steps[int(key)] = [_steps_of(segment) for segment in segments] if isinstance(segments, list) else []
    return steps


def _steps_of(segment: Any) -> tuple[int, int]:
    start, end = (segment.get("start_step"), segment.get("end_step")) if isinstance(segment, dict) else (0, 0)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else (0, 0)


def length_defects(steps: Mapping[int, Sequence[tuple[int, int]]], lengths: Mapping[int, int]) -> Iterator[str]:
    """Annotated steps (by episode and segment) that do not fit the ``lengths`` of the episodes that are used."""
    for index, length in sorted(lengths.items()):
        if index not in steps:
            yield f"episode {index}: expected an annotation for every episode that is used, got none"
        for number, (start, end) in enumerate(steps.get(index, ())):
            where = f"episode {index}: segment {number}"
            if start >= length:
                yield f"{where}: {_defect('start_step', f'< {length}, the length of the episode', start)}"
            elif end > length:
                yield f"{where}: {_defect('end_step', f'<= {length}, the length of the episode', end)}"


def _document_defects(document: Mapping[str, Any]) -> list[str]:
    defects = []
    vision_language = document.get("vision_language_episode_idx", [])
    if not isinstance(vision_language, list) or not all(_is_step(index) for index in vision_language):
        defects.append(_defect("vision_language_episode_idx", "a list of episode numbers", vision_language))
        vision_language = []
    missing = [index for index in vision_language if str(index) not in document]
    if missing:
        defects.append(_defect("vision_language_episode_idx", "episodes of this file", missing))
    thinking_only = {str(index) for index in vision_language}
    for key, episode in document.items():
        if key == "vision_language_episode_idx":
            continue
        defects += [f"episode {key}: {defect}" for defect in _key_defects(key)]
        defects += [f"episode {key}: {defect}" for defect in _episode_defects(episode, key in thinking_only)]
    return defects


def _key_defects(key: str) -> Iterator[str]:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
        yield _defect("key", "an episode number such as '0'", key)


def _episode_defects(episode: Any, thinking_only: bool) -> Iterator[str]:
    """What is wrong with one episode; vision-language episodes need no order of kinds, only something to think."""
    if not isinstance(episode, dict):
        yield _defect("value", "an object with episode_start_interval and segments", episode)
        return
    yield from _foreign_defects(episode)
    interval = episode.get("episode_start_interval")
    if not _is_interval(interval):
        yield _defect("episode_start_interval", "[start, end] with 0 <= start < end", interval)
    segments = episode.get("segments")
    if not isinstance(segments, list) or not segments:
        yield _defect("segments", "a list of at least one segment", segments)
        return
    broken = [[*_segment_defects(segment, number == len(segments) - 1)] for number, segment in enumerate(segments)]
    for number, defects in enumerate(broken):
        yield from (f"segment {number}: {defect}" for defect in defects)
    usable = [segment if not defects else None for segment, defects in zip(segments, broken, strict=True)]
    if not thinking_only:
        yield from _order_defects(usable, interval if _is_interval(interval) else None)
    elif not any(isinstance(s, dict) and s.get("updated_content") is not None for s in segments):
        yield "segments: expected an updated_content in at least one of them (a vision-language episode), got none"


def _segment_defects(segment: Any, last: bool) -> Iterator[str]:
    """What is wrong with one segment by itself."""
    if not isinstance(segment, dict):
        yield _defect("value", "an object", segment)
        return
    yield from _foreign_defects(segment)
    for key in _STEPS:
        if key not in segment:
            yield f"{key}: expected an integer, got nothing (the key is missing)"
        elif not _is_step(segment[key]) and not (key.endswith("end_step") and _is_int(segment[key]) and segment[key] == -1):
            yield _defect(key, "an integer >= 0" + (" or -1" if key.endswith("end_step") else ""), segment[key])
    for key in _OPTIONAL_STEPS:
        value = segment.get(key)
        if value is not None and not _is_step(value) and not (key.endswith("end_step") and _is_int(value) and value == -1):
            yield _defect(key, "an integer >= 0, or no such key", value)
    yield from _text_defects(segment)
    yield from _interval_defects(segment, last)


def _text_defects(segment: Mapping[str, Any]) -> Iterator[str]:
    content = segment.get("content")
    if not _is_text(content):
        yield _defect("content", "a text that is not empty", content)
    if "updated_content" not in segment:
        yield "updated_content: expected a text (think) or null (act), got nothing (the key is missing)"
    for key in _OPTIONAL_TEXTS:
        value = segment.get(key)
        if value is not None and not _is_text(value):
            yield _defect(key, "a text that is not empty, or null", value)
    if segment.get("updated_content") is None and segment.get("updated_content_w_instruction") is not None:
        yield "updated_content_w_instruction: expected only where updated_content is not null, got both a text and null"


def _interval_defects(segment: Mapping[str, Any], last: bool) -> Iterator[str]:
    start, end = segment.get("start_step"), segment.get("end_step")
    if _is_int(end) and (end == -1) != last:
        expected = "-1 in the last segment (the end of the episode)" if last else ">= 0 before the last segment"
        yield _defect("end_step", expected, end)
    for name, low, high in (
        ("end_step", start, end),
        ("reference_end_step", segment.get("reference_start_step"), segment.get("reference_end_step")),
        ("outdated_reference_end_step", segment.get(_OPTIONAL_STEPS[0]), segment.get(_OPTIONAL_STEPS[1])),
    ):
        if isinstance(low, int) and isinstance(high, int) and low >= 0 and -1 != high <= low:
            yield _defect(name, f"> {low}, its start (intervals are half-open)", high)


def _order_defects(segments: Sequence[Mapping[str, Any] | None], interval: Sequence[int] | None) -> Iterator[str]:
    """What is wrong between segments; None stands for one that is broken by itself and compared with nothing."""
    if len(segments) % 2 == 0:
        yield _defect("segments", "2P + 1 of them for P plans (think, act, think, ..., think)", len(segments))
    if segments[0] is not None:
        steps = [segments[0]["start_step"], segments[0]["end_step"]]
        if steps[0] != 0:
            yield _defect("segment 0: start_step", "0", steps[0])
        if interval is not None and len(segments) > 1 and steps != list(interval):
            yield _defect("segment 0: start_step, end_step", f"episode_start_interval {interval}", steps)
    for number, segment in enumerate(segments):
        if segment is not None and (segment["updated_content"] is not None) != (number % 2 == 0):
            expected = "a text (a think segment)" if number % 2 == 0 else "null (an act segment)"
            yield _defect(f"segment {number}: updated_content", expected, segment["updated_content"])
    for number, (before, after) in enumerate(itertools.pairwise(segments), 1):
        if before is not None and after is not None and before["end_step"] != after["start_step"]:
            expected = f"{before['end_step']}, the end of segment {number - 1} (no gap, no overlap)"
            yield _defect(f"segment {number}: start_step", expected, after["start_step"])


def _foreign_defects(record: Mapping[str, Any]) -> Iterator[str]:
    for key in record:
        if key.startswith(_FOREIGN):
            yield f"{key}: expected no key of OneTwoVLA's schema, got one; convert the file to the cot_simple.json schema first"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Not blank, and free of the lone surrogates that JSON can spell and UTF-8 cannot."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors="replace").decode()


def _is_step(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_step(step) for step in value) and value[0] < value[1]


def _defect(name: str, expected: str, got: object) -> str:
    text = repr(got)
    return f"{name}: expected {expected}, got {text if len(text) <= 100 else text[:97] + '...'}"
