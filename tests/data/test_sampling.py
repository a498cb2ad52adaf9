"""The sampling rules as statistics: the draws of many epochs have the probabilities of DESIGN section 5, at fixed seeds."""

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.annotations import (
    TRAIN_KEEP_REASON,
    VALIDATION_KEEP_REASON,
    EpisodeAnnotation,
    Thought,
    choose_thought,
    draw_pair,
    load_annotations,
)
from fusevla.data.samples import SampleSource
from fusevla.evaluate.metrics import training_mean
from tests.data.test_batch import ACTIONS, DATA, MODEL, RECORDS, STATS, TOKENIZER, FakeSet
from tests.references_text import episode_record

LENGTH = 66
EPOCHS = 1500
UNLIKELY = {1: 15.1, 2: 18.4}
"""Chi-square that one sample in 10,000 exceeds, by degrees of freedom."""
START, ACT, THINK, OUTDATED, LAST = 0, 10, 30, 40, 60
"""First frames of the segments: the start interval, acting, thinking, acting with an outdated thought, the open end."""


def loaded(folder, record) -> EpisodeAnnotation:
    (folder / "cot_simple.json").write_text(json.dumps({"0": record}))
    return load_annotations(folder / "cot_simple.json").episodes[0]


@pytest.fixture(scope="module")
def episode(tmp_path_factory) -> EpisodeAnnotation:
    return loaded(tmp_path_factory.mktemp("cot"), episode_record())


def expected(frame: int, keep: float) -> dict[str, float]:
    """The rules once more, written out as a table of probabilities."""
    if frame < ACT:
        p = 0.8 - 0.4 * frame / 10
        return {"reason": p, "act": 1 - p}
    if frame < THINK:
        return {"act": 1.0}
    if frame < OUTDATED or frame >= LAST:
        p = 0.8 - 0.4 * ((frame - THINK) / 10 if frame < OUTDATED else (frame - LAST) / (LENGTH - LAST))
        return {"reason": p * keep, "act_outdated": p * (1 - keep), "act": 1 - p}
    p = 0.4 - 0.4 * (frame - OUTDATED) / 20
    return {"reason_outdated": p, "act": 1 - p}


def chi_square(counts: Mapping[str, int], probabilities: Mapping[str, float]) -> tuple[float, int]:
    """(statistic, degrees of freedom) over the outcomes that can happen; another one is an error."""
    possible = {kind: p for kind, p in probabilities.items() if p > 0}
    assert set(counts) <= set(possible)
    total = sum(counts.values())
    statistic = sum((counts.get(kind, 0) - total * p) ** 2 / (total * p) for kind, p in possible.items())
    return statistic, len(possible) - 1


@pytest.mark.parametrize("keep", [TRAIN_KEEP_REASON, VALIDATION_KEEP_REASON])
@pytest.mark.parametrize("frame", [0, 9, 10, 29, 30, 39, 40, 59, 60, 65])
def test_each_frame_draws_with_the_probabilities_of_its_segment(episode, frame, keep):
    draws = [choose_thought(episode, frame, LENGTH, *draw_pair(7, e, frame), keep_reason=keep) for e in range(EPOCHS)]
    statistic, freedom = chi_square(Counter(draw.kind for draw in draws), expected(frame, keep))
    assert statistic == 0 if freedom == 0 else statistic < UNLIKELY[freedom]


def test_frames_and_epochs_are_drawn_independently(episode):
    """The sum over all frames of an epoch scatters as independent draws do: neither in step nor balanced."""
    chances = np.array([sum(p for kind, p in expected(frame, 0.7).items() if "reason" in kind) for frame in range(LENGTH)])
    kinds = [
        [choose_thought(episode, frame, LENGTH, *draw_pair(11, e, frame)).kind for frame in range(LENGTH)] for e in range(150)
    ]
    totals = np.array([sum("reason" in kind for kind in epoch) for epoch in kinds])
    variance = (chances * (1 - chances)).sum()
    assert abs(totals.mean() - chances.sum()) < 4 * np.sqrt(variance / len(totals))
    assert 0.6 < totals.var() / variance < 1.5


def test_vision_language_episodes_draw_their_thoughts_evenly(episode):
    draws = Counter(choose_thought(episode, 15, LENGTH, *draw_pair(3, e, 15), vision_language=True).target for e in range(EPOCHS))
    assert len(draws) == 3
    statistic, freedom = chi_square(draws, dict.fromkeys(draws, 1 / 3))
    assert statistic < UNLIKELY[freedom]


@given(st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_segments_are_half_open_wherever_they_lie(tmp_path_factory, lengths):
    """Frame by frame, against the boundaries themselves; the last segment ends with the episode."""
    record = copy.deepcopy(episode_record())
    ends = np.cumsum(lengths).tolist()
    for segment, start, end in zip(record["segments"], [0, *ends[:-1]], ends, strict=True):
        segment |= {"start_step": start, "end_step": end}
    record["segments"][-1]["end_step"] = -1
    record["episode_start_interval"] = [0, ends[0]]
    episode = loaded(tmp_path_factory.mktemp("cot"), record)
    owners = [episode.segments.index(episode.segment_at(frame, ends[-1])) for frame in range(ends[-1])]
    assert owners == np.repeat(range(5), lengths).tolist()
    thinks = [choose_thought(episode, frame, ends[-1], 0.0, 0.0).kind for frame in range(ends[-1])]
    assert thinks == np.repeat(["reason", "act", "reason", "reason_outdated", "reason"], lengths).tolist()
    stays = [choose_thought(episode, frame, ends[-1], 0.999, 0.0).stay for frame in range(ends[-1])]
    assert stays == np.repeat([False, False, False, False, True], lengths).tolist()
    late = [choose_thought(episode, frame, ends[-1], 0.0, 0.999).kind for frame in range(ends[2])]
    assert late == np.repeat(["reason", "act", "act_outdated"], lengths[:3]).tolist(), "the start interval always thinks"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SampleSource:
    folder = tmp_path_factory.mktemp("cot")
    (folder / "cot_simple.json").write_text(json.dumps({**RECORDS, "vision_language_episode_idx": [3]}))
    annotations = load_annotations(folder / "cot_simple.json")
    return SampleSource(FakeSet(), annotations, TOKENIZER, None, DATA, MODEL)


def test_actions_of_every_frame_of_two_epochs(source):
    """Real actions up to the end, then the last one, marked as padding; standing still where the last segment acts."""
    seen: Counter[tuple[bool, bool]] = Counter()
    for index in range(len(source)):
        position, frame = source.frames.locate(index)
        rows = source.frames.episode_slice(position)
        for epoch in range(2):
            thought = source.thought(index, epoch, 0)
            chunk, is_pad = source._actions(position, frame, thought.stay)
            steps = index + np.arange(MODEL.action_horizon)
            still = np.array([0, 0, 0, 0, 0, 0, ACTIONS[rows.stop - 1, 6]], np.float32)
            wanted = np.tile(still, (len(steps), 1)) if thought.stay else ACTIONS[np.minimum(steps, rows.stop - 1)]
            np.testing.assert_array_equal(chunk, wanted)
            np.testing.assert_array_equal(is_pad, (steps >= rows.stop) & (not thought.stay))
            assert thought.stay == (frame >= 60 and thought.kind == "act")
            seen[thought.stay, bool(is_pad.any())] += 1
    assert seen[True, True] == 0
    assert min(seen[True, False], seen[False, True], seen[False, False]) > 3


def test_vision_language_samples_never_train_actions_and_draw_from_the_whole_episode(source):
    first = source.frames.episode_slice(3).start
    thoughts: list[Thought] = [source.thought(first + i, epoch, 0) for i in range(62) for epoch in range(5)]
    assert {(thought.kind, thought.actions, thought.stay) for thought in thoughts} == {("reason", False, False)}
    assert len({thought.target for thought in thoughts}) == 3
    assert not source(first + 61, 0, 0).text.diffusion


def test_rows_that_act_leave_vision_language_episodes_out_and_so_does_the_mean(source):
    thinking = source.frames.episode_slice(3)
    kept = np.setdiff1d(source.rows, np.arange(thinking.start, thinking.stop))
    np.testing.assert_array_equal(source.acting_rows, kept)
    assert 0 < len(kept) < len(source)
    np.testing.assert_allclose(training_mean([source]), ACTIONS[kept].mean(axis=0), rtol=1e-5, atol=1e-6)
    only_thinks = SampleSource(source.frames, source.annotations, TOKENIZER, None, DATA, MODEL, episodes=[3])
    np.testing.assert_array_equal(training_mean([only_thinks]), np.zeros(ACTIONS.shape[1]))


def test_options_change_what_is_drawn_and_nothing_else(source):
    """With the same draws: without outdated thoughts exactly those samples act instead."""
    data = dataclasses.replace(DATA, use_outdated_reasoning=False)
    plain = SampleSource(source.frames, source.annotations, TOKENIZER, STATS, data, MODEL)
    for index in range(len(source)):
        with_outdated, without = source.thought(index, 0, 5), plain.thought(index, 0, 5)
        if with_outdated.kind == "reason_outdated":
            assert without == Thought(with_outdated.target, None, "act")
        else:
            assert without == with_outdated
