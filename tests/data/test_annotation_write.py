"""Records of cot_simple.json: whole episodes are covered, texts can be read back, and published records come out the same."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.annotation_write import episode_annotation
from fusevla.data.annotations import check_annotations, load_annotations
from fusevla.data.prompts import initial_content, parse_thought, with_instruction

TASK, PLANS = "pick up the milk and place it in the basket", ["pick up the milk", "place the milk in the basket"]


@st.composite
def written(draw: st.DrawFn) -> tuple[list[str], list[tuple[int, int]], int]:
    """(plans, intervals of thoughts, length)."""
    plans = [f"do part {i}" for i in range(draw(st.integers(1, 4)))]
    steps = draw(st.lists(st.integers(1, 20), min_size=2 * len(plans) + 1, max_size=2 * len(plans) + 1))
    edges = [sum(steps[:i]) for i in range(len(steps))]
    return plans, [*zip(edges[0:-1:2], edges[1::2], strict=True), (edges[-1], -1)], sum(steps)


@given(written())
def test_every_frame_is_covered_and_every_text_can_be_read_back(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[list[str], list[tuple[int, int]], int]
) -> None:
    plans, thinks, length = made
    path = tmp_path_factory.mktemp("records") / "cot_simple.json"
    path.write_text(json.dumps({"3": episode_annotation("do it all", plans, thinks, length)}))
    annotations = load_annotations(path)
    check_annotations(annotations, {3: length})
    segments = annotations.episodes[3].segments
    kinds = [annotations.episodes[3].segment_at(frame, length).updated_content is not None for frame in range(length)]
    assert kinds == [any(a <= frame < (length if b == -1 else b) for a, b in thinks) for frame in range(length)]
    thoughts = [segment.updated_content for segment in segments if segment.updated_content]
    for done, thought in enumerate(thoughts):
        parsed = parse_thought(thought)
        assert parsed is not None
        assert (parsed.plans, parsed.done) == (tuple(plans), tuple(plans[:done]))
        assert parsed.now == (plans[done] if done < len(plans) else None)
    prompts = [initial_content("do it all"), *(with_instruction("do it all", thought) for thought in thoughts[:-1])]
    assert [segment.content for segment in segments[::2]] == prompts


def test_published_records_come_out_the_same(libero_sample: Path) -> None:
    records = json.loads((libero_sample / "cot_simple.json").read_text())
    for line in (libero_sample / "meta" / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        record, (task,) = records[str(episode["episode_index"])], episode["tasks"]
        thinks = [(segment["start_step"], segment["end_step"]) for segment in record["segments"][::2]]
        last = parse_thought(record["segments"][-1]["updated_content"])
        assert last is not None
        assert episode_annotation(task, last.plans, thinks, episode["length"]) == record


def test_an_episode_to_be_looked_at_is_one_thought() -> None:
    record = episode_annotation(TASK, PLANS, [(0, -1)], 2)
    assert [(s["start_step"], s["end_step"]) for s in record["segments"]] == [(0, -1)]
    assert record["episode_start_interval"] == [0, 2]


@pytest.mark.parametrize(
    "thinks",
    [
        [(0, 5), (9, -1)],  # a thought is missing
        [(1, 5), (9, 12), (15, -1)],  # frames before the first
        [(0, 5), (9, 12), (15, 20)],  # frames after the last
        [(0, 5), (5, 12), (15, -1)],  # nothing is done in between
        [(0, 5), (9, 12), (11, -1)],
        [(0, 5), (9, -1), (15, -1)],
        [(0, 5), (9, 12), (20, -1)],  # beyond the episode
    ],
)
def test_intervals_that_are_none_are_refused(thinks: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="episode_annotation: expected"):
        episode_annotation(TASK, PLANS, thinks, 20)
