"""experiments/prepare_libero.py: the whole result or the whole list, and nothing else touched."""

import hashlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import prepare_libero
from fusevla.data.annotations import check_annotations, load_annotations
from fusevla.data.hub import fetch_annotations, fetch_set
from fusevla.data.lerobot import open_set
from fusevla.data.normalize import compute_norm_stats, load_norm_stats
from fusevla.data.prepare import PrepareError
from tests.data import corrupt
from tests.data import lerobot_sets as sets

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[0, 1, 2], ids=["v2.0", "v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return corrupt.write_sets(tmp_path / "source")[request.param]


@pytest.fixture
def v21(tmp_path: Path) -> Path:
    return corrupt.write_sets(tmp_path / "source")[1]


def prepare(root: Path, out: Path, **options: Any) -> None:
    prepare_libero.run(prepare_libero.Args(out=str(out), data=str(root), tokenizer="train", **options))


def state_of(folder: Path) -> dict[str, Any]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in files
    }


def test_the_result_is_a_set_of_its_own(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = state_of(root), tmp_path / "out"
    prepare(root, out)
    assert state_of(root) == before
    made, source = open_set(out), open_set(root)
    assert (made.version, made.episodes) == (source.version, source.episodes)
    assert load_annotations(out / "cot_simple.json") == load_annotations(root / "cot_simple.json")
    assert load_norm_stats(out)["state"].q99.tolist() == compute_norm_stats(source)["state"].q99.tolist()
    report = json.loads((out / "report.json").read_text())
    assert (report["episodes"], report["frames"], report["fps"]) == (2, sum(corrupt.LENGTHS), 10)
    assert sum(report["samples_per_epoch"]["expected"].values()) == pytest.approx(sum(corrupt.LENGTHS), abs=0.01)
    assert sum(report["text"]["histogram"]["samples"]) == pytest.approx(sum(corrupt.LENGTHS), abs=0.01)
    assert (report["defects"], report["warnings"]) == ([], [])
    assert (out / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    first = state_of(out)
    prepare(root, out)
    assert state_of(out) == first
    assert "made from this very input" in capsys.readouterr().out


def test_a_changed_input_or_a_damaged_result_is_made_anew(v21: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(v21, out, check_images="none")
    (out / "report.html").unlink()
    prepare(v21, out, check_images="none")
    assert (out / "report.html").is_file()
    document = json.loads((v21 / "cot_simple.json").read_text()) | {"vision_language_episode_idx": [1]}
    (v21 / "cot_simple.json").write_text(json.dumps(document))
    prepare(v21, out, check_images="none")
    assert json.loads((out / "report.json").read_text())["vision_language_episodes"] == 1


def test_defects_are_listed_and_nothing_is_written(v21: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets.edit_info(v21, total_frames=3)
    sets.episode_file(v21, 1).unlink()
    with pytest.raises(SystemExit) as caught:
        prepare(v21, tmp_path / "out")
    listed = capsys.readouterr().err
    assert caught.value.code == 2
    assert "2 defects" in listed
    assert "total_frames says 3" in listed
    assert "episode_000001.parquet: is missing" in listed
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_broken_image_that_was_not_looked_at_is_no_traceback(v21: Path, tmp_path: Path) -> None:
    images = pq.read_table(sets.episode_file(v21, 0))["image"].to_pylist()
    images[0]["bytes"] = b"nothing"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sets.edit_table(sets.episode_file(v21, 0), image=pa.array(images, kind))
    with pytest.raises(PrepareError, match="frame 0 cannot be decoded"):
        prepare(v21, tmp_path / "out", check_images="none")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_run_left_is_cleared_away(v21: Path, tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone, alive = (tmp_path / f".out.partial-{pid}" for pid in (process.stdout.strip(), os.getppid()))
    gone.mkdir()
    alive.mkdir()
    prepare(v21, tmp_path / "out", check_images="none")
    assert (gone.exists(), alive.exists()) == (False, True)


def test_episodes_without_annotations_are_left_out(root: Path, tmp_path: Path) -> None:
    document = corrupt.annotations()
    del document["0"]
    (root / "cot_simple.json").write_text(json.dumps(document))
    before = state_of(root)
    prepare(root, tmp_path / "out", allow_missing_annotations=True, way="link")
    made = open_set(tmp_path / "out")
    assert [(episode.index, episode.length) for episode in made.episodes] == [(1, corrupt.LENGTHS[1])]
    assert (made.actions == sets.episodes(corrupt.LENGTHS, size=4)[1].actions).all()
    assert (made.image("base_0_rgb", 5) == sets.episodes(corrupt.LENGTHS, size=4)[1].images["image"][5]).all()
    check_annotations(load_annotations(tmp_path / "out/cot_simple.json"), {1: corrupt.LENGTHS[1]})
    assert state_of(root) == before


def test_other_peoples_folders_are_never_replaced(v21: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    for out, message in (
        (tmp_path / "out", "is no prepared set"),
        (v21 / "inside", "apart from the source"),
        (v21, "no prepared"),
    ):
        with pytest.raises(PrepareError, match=message):
            prepare(v21, out)
    assert (tmp_path / "out/precious").read_text() == "x"


def test_texts_of_the_set_are_escaped_in_the_page(v21: Path, tmp_path: Path) -> None:
    file = v21 / "cot_simple.json"
    file.write_text(file.read_text().replace("lift it", "lift <script>alert(1)</script> & $x$"))
    prepare(v21, tmp_path / "out", check_images="none")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page
    assert "lift &lt;script&gt;alert(1)&lt;/script&gt; &amp; $x$" in page
    assert page.count("<details>") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_fetching_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path))

    def download(repo_id: str, repo_type: str, local_dir: str, allow_patterns: str | None) -> None:
        if repo_id == "nowhere/x":
            raise ConnectionError("no route")
        folder = Path(local_dir) / (allow_patterns or "set/*").removesuffix("/*")
        folder.mkdir(parents=True)
        (folder / "cot_simple.json").write_text(repo_type)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    assert fetch_annotations(("nowhere/x", "some/where"), "libero-10-r").read_text() == "dataset"
    with pytest.raises(PrepareError, match=r"give a local folder with --data DIR"):
        fetch_set("nowhere/x")
    with pytest.raises(PrepareError, match=r"nowhere/x: could not be fetched from the hub \(ConnectionError: no route\)"):
        fetch_annotations(("nowhere/x",), "libero-10-r")


def test_help_is_quick_and_a_wrong_call_says_what_is_needed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments/prepare_libero.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert time.perf_counter() - start < 30  # half a second alone; machines that run tests are busy
    assert all(flag in done.stdout for flag in ("--data", "--annotations", "--out", "--check-images", "--tokenizer"))
    done = subprocess.run([*command, "--out", str(tmp_path / "x")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--data DIR is needed" in done.stderr
    assert "Traceback" not in done.stderr
