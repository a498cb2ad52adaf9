"""The evaluation script: what it writes for a policy that is perfect, and bad input."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.toy_expert import Expert
from tests.experiments.help_text import help_without

SCRIPT = str(Path(__file__).parents[2] / "experiments" / "evaluate.py")


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_script"] = module
    spec.loader.exec_module(module)
    return module


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    script.main()


def test_a_report_page_and_films_are_written(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(script, "load", lambda args: Expert(3))
    out = tmp_path / "out"
    run(script, monkeypatch, "--checkpoint", "x", "--out", out, "--episodes", 4, "--swaps", 2, "--films", 1, "--seed", 5)
    report = json.loads((out / "report.json").read_text())
    assert (report["success"], report["thought_accuracy"], report["faithfulness"], report["episodes"]) == (1, 1, 1, 4)
    assert report["wrong_thought_success"] == 0
    assert report["wrong_thought"]["obeys_thought"] == report["wrong_last_line"]["obeys_thought"] == 1
    assert [entry["seed"] for entry in report["results"]] == [5 * 1_000_003 + i for i in range(4)]
    assert sum(entry["episodes"] for entry in report["per_task"].values()) == 4
    films = sorted(out.glob("*.mp4"))
    assert [film.name in (out / "report.html").read_text() for film in films] == [True]
    assert "success 100.0% of 4 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--episodes", 0, "--batch", -1), "--episodes: expected at least 1, got 0; --batch: expected at least 1, got -1"),
        (("--out", "full"), "full exists and is not empty"),
        ((), "nowhere: expected checkpoints of a training run"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    assert "--swaps" in help_without(SCRIPT, ("jax", "numpy", "gymnasium", "av"))
