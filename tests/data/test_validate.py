"""Every defect in one list, and what the rules accept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusevla.data.check_images import image_count
from fusevla.data.validate import Rules, validate
from tests.data import corrupt
from tests.data import lerobot_sets as sets


@pytest.fixture(params=[0, 1, 2], ids=["v2.0", "v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return corrupt.write_sets(tmp_path)[request.param]


@pytest.fixture
def v21(tmp_path: Path) -> Path:
    return corrupt.write_sets(tmp_path)[1]


def edit_annotations(root: Path, **episodes: Any) -> dict[str, Any]:
    """``_0=None`` drops an episode, other values replace it."""
    file = root / "cot_simple.json"
    document = json.loads(file.read_text()) | {name.lstrip("_"): value for name, value in episodes.items()}
    document = {name: value for name, value in document.items() if value is not None}
    file.write_text(json.dumps(document))
    return document


def found(root: Path, **rules: Any) -> str:
    return "\n".join(validate(root, root / "cot_simple.json", Rules(**rules)).defects)


def test_defects_of_every_part_are_in_one_list(v21: Path) -> None:
    first, second = sets.episode_file(v21, 0), sets.episode_file(v21, 1)
    state = sets.episodes(corrupt.LENGTHS, size=4)[0].state.copy()
    state[3, 2] = np.inf
    sets.edit_table(first, state=pa.FixedSizeListArray.from_arrays(state.reshape(-1), 8), actions=[[0.0] * 6] * 62)
    images = pq.read_table(second)["image"].to_pylist()
    images[5]["bytes"] = images[5]["bytes"][:40]
    sets.edit_table(second, image=pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    sets.edit_info(v21, total_frames=7, fps=30)
    record = corrupt.annotations()["1"]
    record["segments"][1] |= {"end_step": 500, "content": None}
    edit_annotations(v21, _0=None, _1=record, _9=corrupt.annotations()["1"])
    listed = found(v21)
    for part in (
        "meta/info.json: total_frames says 7",
        "info.json says fps 30",
        "episode 0: state has 1 values that are NaN or infinite, the first in frame 3, dimension 2",
        "'actions' cannot be read: 7 numbers per row expected (info.json: shape [7]), got 6",
        "cot_simple.json: episode 0: expected an annotation",
        "cot_simple.json: episode 1: segment 1: content: expected a text",
        "cot_simple.json: episode 1: segment 1: end_step: expected <= 70, the length of the episode, got 500",
        "cot_simple.json: episode 9: expected an episode of the set",
        "image of episode 1, frame 5 cannot be decoded",
    ):
        assert part in listed
    assert len(listed.splitlines()) == 9


def test_annotations_of_an_unreadable_episode_are_held_against_its_record(v21: Path) -> None:
    sets.episode_file(v21, 1).write_bytes(b"PAR1")
    record = corrupt.annotations()["1"]
    record["segments"][-2]["end_step"] = record["segments"][-1]["start_step"] = 90
    edit_annotations(v21, _1=record)
    listed = found(v21)
    assert "episode 1: segment 4: start_step: expected < 70" in listed
    assert "expected an episode of the set" not in listed


def test_missing_and_extra_annotations_are_accepted_only_when_asked(root: Path) -> None:
    edit_annotations(root, _1=None, _5=corrupt.annotations()["0"])
    assert len(found(root).splitlines()) == 2
    assert "episode 5" in found(root, allow_missing_annotations=True)
    assert "episode 1" in found(root, allow_extra_annotations=True)
    both = validate(root, root / "cot_simple.json", Rules(allow_missing_annotations=True, allow_extra_annotations=True))
    assert (both.defects, both.unannotated) == ((), (1,))
    edit_annotations(root, _0=None)
    assert "got none of any" in found(root, allow_missing_annotations=True, allow_extra_annotations=True)


def test_a_missing_file_of_annotations(root: Path) -> None:
    (root / "cot_simple.json").unlink()
    assert found(root) == "cot_simple.json: expected a cot_simple.json, found no file; give it with --annotations FILE"


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"0": ' + "1" * 5000 + "}", "", "\ufeff{}", '{"0": 1, "0": 2}'])
def test_annotations_that_no_parser_likes(v21: Path, text: str) -> None:
    (v21 / "cot_simple.json").write_text(text)
    assert "cot_simple.json: expected" in found(v21)


def test_which_images_are_looked_at(v21: Path) -> None:
    path = sets.episode_file(v21, 1)
    images = pq.read_table(path)["image"].to_pylist()
    images[3]["bytes"] = b"nothing"
    sets.edit_table(path, image=pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    assert "frame 3" in found(v21)
    assert found(v21, images="sample") == found(v21, images="none") == ""
    seen: list[int] = []
    counts = []

    def watch(frames: Any) -> Any:
        counts.append(image_count(frames, "all"))
        return seen.append

    validate(v21, v21 / "cot_simple.json", watch=watch)
    assert sum(seen) == counts[0] == 2 * sum(corrupt.LENGTHS)


def test_values_that_changed_since_the_statistics_were_stored_are_a_warning(root: Path) -> None:
    path = next(root.glob("data/*/*.parquet"))
    actions = np.array(pq.read_table(path)["actions"].to_pylist(), np.float32)
    actions[4, 1] += 100
    sets.edit_table(path, actions=pa.FixedSizeListArray.from_arrays(actions.reshape(-1), 7))
    warned = validate(root, root / "cot_simple.json").warnings
    assert len(warned) == 1
    assert "the statistics of actions are not those" in warned[0]


def test_other_lies_of_info(v21: Path) -> None:
    info = json.loads((v21 / "meta/info.json").read_text())
    info["features"]["depth"] = {"dtype": "float32", "shape": [3]}
    sets.edit_info(v21, features=info["features"], total_videos=4, total_chunks=3, splits={"train": "0:9"})
    findings = validate(v21, v21 / "cot_simple.json")
    assert "\n".join(findings.defects).count("lacks column 'depth'") == 2
    assert [key in "\n".join(findings.warnings) for key in ("total_videos", "total_chunks", "'train'")] == [True] * 3


def test_another_sets_annotations_are_a_warning(v21: Path) -> None:
    records = corrupt.annotations()
    edit_annotations(v21, _0=records["1"], _1=records["0"])
    assert "episode 0: the set's task is 'task number 0'" in "\n".join(validate(v21, v21 / "cot_simple.json").warnings)
