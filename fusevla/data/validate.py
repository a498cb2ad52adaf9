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

    Raises:
        ImportError: a camera is kept as video, images are to be checked and PyAV is not installed.
    """
    noted = Defects(root)
    frames = inspect_set(root, rules.columns, rules.cameras, noted)
    defects, warnings = [*noted], list[str]()
    if frames is not None:
        defects += claim_defects(frames)
        warnings += claim_warnings(frames)
    document, problems = _read_annotations(annotations)
    defects += [f"{annotations}: {problem}" for problem in problems]
    missing: tuple[int, ...] = ()
    if frames is not None and document:
        missing = tuple(episode.index for episode in frames.episodes if str(episode.index) not in document)
        defects += [f"{annotations}: {defect}" for defect in _fit_defects(document, frames.episodes, rules)]
        warnings += [f"{annotations}: {warning}" for warning in _fit_warnings(document, frames.episodes, missing)]
        if len(missing) == len(frames.episodes):
            defects.append(f"{annotations}: expected annotations of this set's episodes, got none of any")
    if frames is not None:
        defects += image_defects(frames, rules.images, watch(frames) if watch else lambda count: None)
    if defects or frames is None:
        return Findings(tuple(dict.fromkeys(defects)), tuple(warnings))
    return Findings((), tuple(warnings), frames, load_annotations(annotations), missing)


def _read_annotations(file: Path) -> tuple[dict[str, object], list[str]]:
    if not file.is_file():
        return {}, ["expected a cot_simple.json, found no file; give it with --annotations FILE"]
    return inspect_document(file)


def _fit_defects(document: Mapping[str, object], episodes: Sequence[Episode], rules: Rules) -> Iterator[str]:
    """Annotations against the episodes, both ways."""
    steps = document_steps(document)
    lengths = {episode.index: episode.length for episode in episodes}
    used = {index: length for index, length in lengths.items() if index in steps or not rules.allow_missing_annotations}
    yield from length_defects(steps, used)
    if not rules.allow_extra_annotations:
        for index in sorted(set(steps) - set(lengths)):
            yield f"episode {index}: expected an episode of the set ({len(lengths)} of them), got annotations without one"


def _fit_warnings(document: Mapping[str, object], episodes: Sequence[Episode], missing: Sequence[int]) -> Iterator[str]:
    """An instruction that is not the episode's task: the annotations may belong to another set, or be shifted."""
    if missing:
        yield f"{len(missing)} episodes have no annotation, the first is {missing[0]}"
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
