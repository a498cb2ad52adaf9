"""The evaluation script: what it writes for a policy that is perfect, and bad input."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments import evaluate
from tests.evaluate.toy_expert import Expert
from tests.experiments.help_text import help_without

SCRIPT = str(Path(__file__).parents[2] / "experiments" / "evaluate.py")


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    return evaluate


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    script.main()


@pytest.fixture
def perfect(script: Any, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Every checkpoint is an expert; the steps of those that were loaded."""
    loaded: list[int | None] = []

    def load(args: Any, job: Any, step: int | None) -> Expert:
        loaded.append(step)
        return Expert(3, wrong=step is None)

    monkeypatch.setattr(script, "load", load)
    monkeypatch.setattr(script, "steps_of", lambda args: [None, 10, 20])
    return loaded


FEW = ("--checkpoint", "x", "--episodes", 4, "--swaps", 2, "--films", 1, "--seed", 5)


def test_a_report_page_and_films_are_written(
    script: Any, perfect: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    run(script, monkeypatch, *FEW, "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert (report["success"], report["thought_accuracy"], report["faithfulness"], report["episodes"]) == (1, 1, 1, 4)
    assert report["wrong_thought_success"] == 0
    assert report["wrong_thought"]["obeys_thought"] == report["wrong_last_line"]["obeys_thought"] == 1
    assert [entry["ticket"]["key"] for entry in report["results"]] == [[5 * 1_000_003 + i] for i in range(4)]
    assert sum(entry["episodes"] for entry in report["per_task"].values()) == 4
    page = (out / "report.html").read_text()
    films = sorted(out.glob("*.mp4"))
    assert len(films) == 1 + 2 * 2  # of one undisturbed episode, and of two of each kind of wrong thought
    assert all(film.name in page for film in films)
    assert (out / "success_per_task.png").stat().st_size > 1000
    assert "success_curve.png" not in page
    assert perfect == [20]
    assert "success 100.0% of 4 episodes" in capsys.readouterr().out


def test_success_over_training_is_drawn_where_asked_for(
    script: Any, perfect: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(script, monkeypatch, *FEW, "--out", out, "--curve", 2)
    curve = json.loads((out / "report.json").read_text())["curve"]
    assert [(point["step"], point["episodes"], point["success"]) for point in curve] == [(0, 2, 0), (10, 2, 1), (20, 4, 1)]
    assert (out / "success_curve.png").exists()
    assert "success_curve.png" in (out / "report.html").read_text()


def test_interrupted_it_goes_on_and_other_settings_are_refused(
    script: Any, perfect: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    run(script, monkeypatch, *FEW, "--out", out)
    whole, journal = (out / "report.json").read_bytes(), out / "episodes.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    (out / "report.json").unlink()
    run(script, monkeypatch, *FEW, "--out", out)
    assert (out / "report.json").read_bytes() == whole
    assert sorted(journal.read_text().splitlines()) == sorted("".join(lines).splitlines())
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *FEW, "--episodes", 5, "--out", out)
    assert "holds an evaluation with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--episodes", 0, "--batch", -1), "--episodes: expected at least 1, got 0; --batch: expected at least 1, got -1"),
        (("--tasks", "0,x"), "--tasks: expected numbers with commas between them, got '0,x'"),
        (("--suite", "object", "--checkpoint", "base"), "--checkpoint base: only the toy has one"),
        (("--suite", "kitchen"), "unknown suite 'kitchen'; expected one of libero_spatial"),
        ((), "nowhere: expected checkpoints of a training run"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    script: Any, perfect: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, *FEW, "--out", tmp_path)
    assert caught.value.code == 2
    assert "exists and is no evaluation to go on with" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["photo.jpg"]
    assert not perfect  # before anything long begins


def test_help_imports_nothing_heavy() -> None:
    assert "--swaps" in help_without(SCRIPT, ("jax", "numpy", "gymnasium", "av"))
