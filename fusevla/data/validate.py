"""Everything that is wrong with a set and its annotations, in one list, before any long work starts.

Defects make a set unusable (or a sample of it wrong); warnings are worth knowing. Every line names file, episode and
segment where there is one, what was expected and what is there.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fusevla.data.annotation_schema import document_steps, inspect_document, length_defects
from fusevla.data.annotations import Annotations, load_annotations
from fusevla.data.check_images import Which, image_defects
from fusevla.data.claims import claim_defects, claim_warnings
from fusevla.data.lerobot import Defects, Episode, LeRobotSet, inspect_set

__all__ = ["Findings", "Rules", "validate"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What to look at, and which defects are accepted."""

    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb")
    columns: tuple[tuple[str, str], ...] = ()
    """(name, column) pairs for columns that are not recognised."""
    images: Which = "all"
    allow_missing_annotations: bool = False
    """Episodes without annotations are left out of what is usable."""
    allow_extra_annotations: bool = False
    """Annotations of episodes that the set lacks are ignored."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found. ``frames`` and ``annotations`` are there when ``defects`` is empty."""

    defects: tuple[str, ...]
    warnings: tuple[str, ...]
    frames: LeRobotSet | None = None
    annotations: Annotations | None = None
    unannotated: tuple[int, ...] = ()
    """Numbers of the episodes without annotations, where the rules allow them."""


def validate(
    root: Path, annotations: Path, rules: Rules = Rules(), watch: Callable[[LeRobotSet], Callable[[int], None]] | None = None
) -> Findings:
    """Looks at everything; reads only.

    Args:
        root: A LeRobot folder.
        annotations: Its ``cot_simple.json``.
        rules: What to look at.
        watch: Called with the set before its images are decoded; gives what is called with the number of images done.
    """
    noted = Defects(root)
    frames, lengths = inspect_set(root, rules.columns, rules.cameras, noted)
    defects, warnings = [*noted], list[str]()
    if frames is not None:
        defects += claim_defects(frames)
        warnings += claim_warnings(frames)
    document, problems = _read_annotations(annotations)
    steps, missing = document_steps(document), tuple[int, ...]()
    if document and lengths:
        missing = tuple(sorted(set(lengths) - set(steps)))
        problems += _fit_defects(steps, lengths, missing, rules)
    name = annotations.relative_to(root) if annotations.is_relative_to(root) else annotations
    defects += [f"{name}: {problem}" for problem in problems]
    if frames is not None:
        warnings += [f"{name}: {warning}" for warning in _other_tasks(document, frames.episodes)]
        defects += image_defects(frames, rules.images, watch(frames) if watch else lambda count: None)
    if defects or frames is None:
        return Findings(tuple(dict.fromkeys(defects)), tuple(warnings))
    return Findings((), tuple(warnings), frames, load_annotations(annotations), missing)


def _read_annotations(file: Path) -> tuple[dict[str, object], list[str]]:
    if not file.is_file():
        return {}, ["expected a cot_simple.json, found no file; give it with --annotations FILE"]
    return inspect_document(file)


def _fit_defects(
    steps: Mapping[int, Sequence[tuple[int, int]]], lengths: Mapping[int, int], missing: Sequence[int], rules: Rules
) -> Iterator[str]:
    """Annotations against the episodes, both ways."""
    left_out = missing if rules.allow_missing_annotations else ()
    yield from length_defects(steps, {index: length for index, length in lengths.items() if index not in left_out})
    if len(left_out) == len(lengths):
        yield f"expected annotations of this set's {len(lengths)} episodes, got none of any"
    if not rules.allow_extra_annotations:
        for index in sorted(set(steps) - set(lengths)):
            yield f"episode {index}: expected an episode of the set ({len(lengths)} of them), got annotations without one"


def _other_tasks(document: Mapping[str, object], episodes: Sequence[Episode]) -> Iterator[str]:
    """Instructions that are not the episode's task: the annotations may belong to another set, or be shifted."""
    for episode in episodes:
        content = _first_content(document.get(str(episode.index)))
        if content is not None and _words(episode.task) not in _words(content):
            yield f"episode {episode.index}: the set's task is {episode.task!r}, segment 0 begins {content[:100]!r}"


def _first_content(record: object) -> str | None:
    segments = record.get("segments") if isinstance(record, dict) else None
    first = segments[0] if isinstance(segments, list) and segments else None
    content = first.get("content") if isinstance(first, dict) else None
    return content if isinstance(content, str) else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
