"""Expected samples: exact, so they agree with a naive integration over the draws."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.annotations import Annotations, EpisodeAnnotation, choose_thought, load_annotations
from fusevla.data.expected import expected_thoughts
from fusevla.data.lerobot import Episode
from fusevla.data.summary import segment_kind
from tests.data import corrupt

GRID = 16
"""Cells of r1: the probabilities move by 1/GRID at most. Those of r2 hit 0.7 and thirds exactly."""


@pytest.fixture(scope="module")
def annotation(tmp_path_factory: pytest.TempPathFactory) -> EpisodeAnnotation:
    file = tmp_path_factory.mktemp("cot") / "cot_simple.json"
    file.write_text(json.dumps(corrupt.annotations(1)))
    return load_annotations(file).episodes[0]


def naive(annotation: EpisodeAnnotation, length: int, keep: float, outdated: bool, vision_language: bool) -> dict:
    first, second = (1, 30) if vision_language else (GRID, 10)
    counts: Counter = Counter()
    for frame in range(length):
        for r1 in (np.arange(first) + 0.5) / first:
            for r2 in (np.arange(second) + 0.5) / second:
                options = {"use_outdated_reasoning": outdated, "keep_reason": keep, "vision_language": vision_language}
                counts[choose_thought(annotation, frame, length, float(r1), float(r2), **options)] += 1
    return {thought: count / (first * second) for thought, count in counts.items()}


@pytest.mark.parametrize(
    ("keep", "outdated", "vision_language", "stretch"),
    [(0.7, True, False, False), (1.0, False, False, False), (0.7, True, True, False), (0.7, True, False, True)],
)
def test_expected_counts_are_the_integral_of_the_rules(
    annotation: EpisodeAnnotation, keep: float, outdated: bool, vision_language: bool, stretch: bool
) -> None:
    if stretch:  # a start interval that ends inside a segment
        annotation = dataclasses.replace(annotation, start_interval=(0, 7))
    length = 64
    annotations = Annotations({0: annotation}, frozenset({0} if vision_language else ()))
    exact = expected_thoughts([Episode(0, length, "task")], annotations, keep, outdated)
    expected = naive(annotation, length, keep, outdated, vision_language)
    assert sum(exact.values()) == pytest.approx(length)
    assert set(exact) == set(expected)
    for thought, count in exact.items():
        assert count == pytest.approx(expected[thought], abs=length / GRID / 2), thought


@given(st.integers(61, 400))
def test_every_frame_is_drawn_once(annotation: EpisodeAnnotation, length: int) -> None:
    exact = expected_thoughts([Episode(0, length, "task")] * 2, Annotations({0: annotation}))
    assert sum(exact.values()) == pytest.approx(2 * length)
    assert all(count > 0 for count in exact.values())


def test_kinds_of_segments(annotation: EpisodeAnnotation) -> None:
    kinds = [segment_kind(segment) for segment in annotation.segments]
    assert kinds[::2] == ["think"] * len(kinds[::2])
    assert set(kinds[1::2]) <= {"act", "act, outdated thought"}
