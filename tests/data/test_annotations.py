"""Annotations: the schema with every defect at once, and the thought of a frame."""

import copy
import json
import pathlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.annotations import (
    VALIDATION_KEEP_REASON,
    AnnotationError,
    Thought,
    act_only_prefix,
    check_annotations,
    choose_thought,
    draw_pair,
    load_annotations,
    possible_thoughts,
)
from fusevla.data.prompts import initial_content, plan_thought, with_instruction
from tests.references_text import choose, episode_record

SAMPLE = pathlib.Path(__file__).parents[3] / "shared" / "libero_sample" / "cot_simple.json"
RECORD = episode_record()
LENGTH = 61
UNIT = st.floats(0, 1, exclude_max=True)


def load(tmp_path, document):
    file = tmp_path / "cot_simple.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_annotations(file)


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return load(tmp_path_factory.mktemp("cot"), {"0": RECORD}).episodes[0]


def thought_of(expected: tuple) -> Thought:
    prefix, target, kind, stay, actions = expected
    return Thought(prefix, target, kind, stay=stay, actions=actions)


@given(frame=st.integers(0, LENGTH - 1), r1=UNIT, r2=UNIT, keep=st.sampled_from([0.7, 1.0]), outdated=st.booleans())
def test_choice_agrees_with_the_rules(episode, frame, r1, r2, keep, outdated):
    got = choose_thought(episode, frame, LENGTH, r1, r2, use_outdated_reasoning=outdated, keep_reason=keep)
    assert got == thought_of(choose(RECORD, frame, LENGTH, r1, r2, keep, outdated))
    assert got in possible_thoughts(episode, use_outdated_reasoning=outdated)


@pytest.mark.parametrize(
    ("frame", "r1", "r2", "expected"),
    [
        (0, 0.79, 0.99, ("reason", 0)),  # the start interval always thinks
        (0, 0.81, 0.0, ("act", 1)),
        (9, 0.43, 0.99, ("reason", 0)),  # p = 0.8 - 0.4 * 9/10 = 0.44
        (9, 0.45, 0.0, ("act", 1)),
        (10, 0.0, 0.0, ("act", 1)),  # half-open: frame 10 acts
        (30, 0.79, 0.69, ("reason", 1)),
        (30, 0.79, 0.71, ("act_outdated", 1)),
        (30, 0.81, 0.0, ("act", 2)),
        (40, 0.39, 0.0, ("reason_outdated", 1)),  # act segment with an outdated thought: p = 0.4 at its start
        (40, 0.41, 0.0, ("act", 2)),
        (59, 0.019, 0.0, ("reason_outdated", 1)),
        (59, 0.021, 0.0, ("act", 2)),
        (60, 0.79, 0.0, ("reason", 2)),
        (60, 0.81, 0.0, ("act", 3)),
    ],
)
def test_choice_by_hand(episode, frame, r1, r2, expected):
    prompts = [initial_content("put the red block in the bowl")]
    prompts += [
        with_instruction("put the red block in the bowl", plan_thought(["grasp the red block", "lift it"], n)) for n in range(3)
    ]
    got = choose_thought(episode, frame, LENGTH, r1, r2)
    assert (got.kind, got.prefix) == (expected[0], prompts[expected[1]])
    assert got.actions == got.kind.startswith("act") == (got.target is None)
    assert got.stay == (frame == 60 and got.kind == "act")


def test_the_last_segment_ramps_to_the_end_of_the_episode(episode):
    # p = 0.8 - 0.4 * 19/40 = 0.61 with 100 frames
    assert choose_thought(episode, 79, 100, 0.60, 0.0).kind == "reason"
    assert choose_thought(episode, 79, 100, 0.62, 0.0).stay


def test_validation_never_acts_on_an_outdated_thought(episode):
    kinds = {
        choose_thought(episode, frame, LENGTH, r1, 0.999, keep_reason=VALIDATION_KEEP_REASON).kind
        for frame in range(LENGTH)
        for r1 in (0.0, 0.3, 0.9)
    }
    assert kinds == {"reason", "reason_outdated", "act"}


def test_without_reasoning_every_sample_acts_on_the_stripped_first_content(episode):
    expected = "Instruction: put the red block in the bowl. \nPlan: TBD.\n What I have done: TBD.\nNow I need to do: TBD."
    for frame in (0, 35, 60):
        assert choose_thought(episode, frame, LENGTH, 0.0, 0.0, use_reasoning=False) == Thought(expected, None, "act")
    assert possible_thoughts(episode, use_reasoning=False) == {Thought(expected, None, "act")}
    assert act_only_prefix("put the red block in the bowl") == expected


def test_vision_language_episodes_only_think(episode):
    draws = [choose_thought(episode, 15, LENGTH, 0.99, r2, vision_language=True) for r2 in (0.0, 0.34, 0.67, 0.999)]
    assert [draw.target for draw in draws] == [plan_thought(["grasp the red block", "lift it"], n) for n in (0, 1, 2, 2)]
    assert {(draw.kind, draw.actions, draw.stay) for draw in draws} == {("reason", False, False)}
    assert set(draws) == possible_thoughts(episode, vision_language=True)


@pytest.mark.parametrize("frame", [-1, LENGTH, 10_000])
def test_frames_outside_the_episode(episode, frame):
    with pytest.raises(IndexError, match=rf"expected one of 0..60 .*got {frame}"):
        choose_thought(episode, frame, LENGTH, 0.5, 0.5)


def test_draws_are_a_pure_function_of_seed_epoch_and_row():
    keys = [(seed, epoch, row) for seed in (0, 7) for epoch in (0, 1) for row in range(500)]
    draws = [draw_pair(*key) for key in keys]
    assert draws == [draw_pair(*key) for key in keys]
    flat = [value for draw in draws for value in draw]
    assert len(set(flat)) == len(flat)
    assert all(0 <= value < 1 for value in flat)
    assert abs(sum(flat) / len(flat) - 0.5) < 0.03
    assert draw_pair(1, 2, 3) == (0.6704722626516632, 0.1110146366693816), "a stored draw: it must never change"


def test_strings_of_the_annotated_data():
    file = json.loads(SAMPLE.read_text()) if SAMPLE.is_file() else pytest.skip("no sample data")
    segments = file["0"]["segments"]
    task = "pick up the alphabet soup and place it in the basket"
    plans = ["pick up the alphabet soup", "place the alphabet soup in the basket"]
    assert initial_content(task) == segments[0]["content"]
    for done in range(3):
        assert plan_thought(plans, done) == segments[2 * done]["updated_content"]
        assert with_instruction(task, plan_thought(plans, done)) == segments[2 * done]["updated_content_w_instruction"]


@pytest.mark.skipif(not SAMPLE.is_file(), reason="no sample data")
def test_real_annotations_load_and_every_frame_has_a_thought():
    annotations = load_annotations(SAMPLE)
    record = json.loads(SAMPLE.read_text())
    assert sorted(annotations.episodes) == list(range(12))
    assert annotations.vision_language == frozenset()
    check_annotations(annotations, {0: 119, 1: 120, 2: 111})
    for frame in range(119):
        for r1, r2 in ((0.0, 0.0), (0.5, 0.9), (0.9, 0.1)):
            assert choose_thought(annotations.episodes[0], frame, 119, r1, r2) == thought_of(
                choose(record["0"], frame, 119, r1, r2)
            )


@pytest.mark.parametrize(("plans", "done"), [([], 0), (["a"], 2), (["a"], -1)])
def test_plan_thought_errors(plans, done):
    with pytest.raises(ValueError, match="plan_thought: expected plans and 0 <= done"):
        plan_thought(plans, done)


def edited(*edits):
    """A valid file with changes: (path, value) or (path,) to delete."""
    document = {"vision_language_episode_idx": [], "3": copy.deepcopy(RECORD)}
    for path, *value in edits:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        if value:
            target[path[-1]] = value[0]
        else:
            del target[path[-1]]
    return document


SEGMENTS = ("3", "segments")
START = "(intervals are half-open)"
FOREIGN = "no key of OneTwoVLA's schema, got one"
IN_SEGMENTS: list[tuple[int, str, Any, str]] = [
    # segment, key, value, what the message expects
    (1, "start_step", True, "an integer >= 0, got True"),
    (1, "start_step", 9, "10, the end of segment 0 (no gap, no overlap), got 9"),
    (1, "start_step", 11, "10, the end of segment 0 (no gap, no overlap), got 11"),
    (1, "end_step", 10, f"> 10, its start {START}, got 10"),
    (1, "end_step", 30.5, "an integer >= 0 or -1, got 30.5"),
    (1, "end_step", -1, ">= 0 before the last segment, got -1"),
    (4, "end_step", 61, "-1 in the last segment (the end of the episode), got 61"),
    (2, "reference_end_step", None, "an integer >= 0 or -1, got None"),
    (2, "reference_end_step", 0, f"> 0, its start {START}, got 0"),
    (3, "outdated_reference_start_step", "10", "an integer >= 0, or no such key, got '10'"),
    (3, "outdated_reference_end_step", 9, f"> 10, its start {START}, got 9"),
    (2, "content", "  ", "a text that is not empty, got '  '"),
    (2, "updated_content", 5, "a text that is not empty, or null, got 5"),
    (1, "updated_content", "Plan", "null (an act segment), got 'Plan'"),
    (3, "updated_content_w_instruction", "Plan", "only where updated_content is not null, got both a text and null"),
    (3, "outdated_content", "", "a text that is not empty, or null, got ''"),
    (0, "possible_contents", [], FOREIGN),
    (0, "user_answer_2", "", FOREIGN),
]
DEFECTS: list[tuple[tuple[Any, ...], Any, str]] = [
    ((*SEGMENTS, n, key), value, f"episode 3: segment {n}: {key}: expected {rule}") for n, key, value, rule in IN_SEGMENTS
]
DEFECTS += [
    (("3", "episode_start_interval"), [4, 4], "episode 3: episode_start_interval: expected [start, end] with 0 <= start < end"),
    (
        ("3", "episode_start_interval"),
        [0, 12],
        "episode 3: segment 0: start_step, end_step: expected episode_start_interval [0, 12]",
    ),
    (("3", "segments"), [], "episode 3: segments: expected a list of at least one segment, got []"),
    (("3",), 7, "episode 3: value: expected an object with episode_start_interval and segments, got 7"),
    ((*SEGMENTS, 1), "x", "episode 3: segment 1: value: expected an object, got 'x'"),
    (("3", "user_intervention_step"), 0, f"episode 3: user_intervention_step: expected {FOREIGN}"),
    (("vision_language_episode_idx",), [3, 9], "vision_language_episode_idx: expected episodes of this file, got [9]"),
    (("vision_language_episode_idx",), ["3"], "vision_language_episode_idx: expected a list of episode numbers, got ['3']"),
    (("03",), RECORD, "episode 03: key: expected an episode number such as '0', got '03'"),
]


@pytest.mark.parametrize(("path", "value", "message"), DEFECTS)
def test_each_defect_is_named(tmp_path, path, value, message):
    with pytest.raises(AnnotationError) as error:
        load(tmp_path, edited((path, value)))
    assert len(error.value.defects) == 1, error.value
    assert error.value.defects[0].startswith(message)
    assert str(tmp_path / "cot_simple.json") in str(error.value)


@pytest.mark.parametrize(
    "key", ["start_step", "end_step", "reference_start_step", "reference_end_step", "content", "updated_content"]
)
def test_missing_keys_are_named(tmp_path, key):
    with pytest.raises(AnnotationError, match=rf"episode 3: segment 1: {key}: expected .* got (nothing|None)"):
        load(tmp_path, edited(((*SEGMENTS, 1, key),)))


def test_all_defects_come_at_once(tmp_path):
    document = edited(((*SEGMENTS, 0, "content"), ""), ((*SEGMENTS, 4, "end_step"), 70), (("3", "possible_contents"), []))
    document["x"] = []
    with pytest.raises(AnnotationError) as error:
        load(tmp_path, document)
    assert len(error.value.defects) == 5
    assert "5 defects" in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).defects == error.value.defects


def test_an_even_number_of_segments_is_refused(tmp_path):
    document = edited(((*SEGMENTS, 4),))
    document["3"]["segments"][3]["end_step"] = -1
    with pytest.raises(AnnotationError, match=r"segments: expected 2P \+ 1 of them for P plans .*got 4"):
        load(tmp_path, document)


def test_vision_language_episodes_need_something_to_think(tmp_path):
    loose = {"episode_start_interval": [0, 1], "segments": [RECORD["segments"][1] | {"end_step": -1}]}
    with pytest.raises(AnnotationError, match="expected an updated_content in at least one of them"):
        load(tmp_path, {"vision_language_episode_idx": [0], "0": loose})
    loose["segments"].insert(0, RECORD["segments"][2])
    assert load(tmp_path, {"vision_language_episode_idx": [0], "0": loose}).vision_language == {0}


def test_unknown_keys_are_kept(tmp_path):
    annotations = load(tmp_path, edited(((*SEGMENTS, 1, "note"), [1]), (("3", "robot"), "panda")))
    assert annotations.episodes[3].segments[1].extra == {"note": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON in UTF-8"),
        ("[]", "document: expected an object"),
        ('{"0": 1, "0": 2}', "every key once in an object, got '0'"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a cot_simple.json, found none at .*none.json"):
        load_annotations(tmp_path / "none.json")


def test_annotations_are_compared_with_the_set(tmp_path):
    annotations = load(tmp_path, edited())
    check_annotations(annotations, {3: LENGTH})
    with pytest.raises(AnnotationError) as error:
        check_annotations(annotations, {3: 55, 4: 10}, "cot_simple.json")
    assert error.value.defects == (
        "episode 3: segment 3: end_step: expected <= 55, the length of the episode, got 60",
        "episode 3: segment 4: start_step: expected < 55, the length of the episode, got 60",
        "episode 4: expected an annotation for every episode that is used, got none",
    )
