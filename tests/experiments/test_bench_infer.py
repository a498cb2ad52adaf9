"""The benchmark of inference: its keys, that both sides say and do the same, and bad input."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest

from fusevla.presets import PRESETS, TOY
from tests.experiments.help_text import help_without
from tests.tiny import CONFIG

SCRIPT = str(Path(__file__).parents[2] / "experiments" / "bench_infer.py")
OURS = ("prefill", "first_token", "reason", "act", "act_known_times")


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.mark.slow
def test_stages_reference_and_agreement(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(PRESETS, "toy", dataclasses.replace(TOY, model=CONFIG, num_steps=2))
    file = tmp_path / "bench.json"
    small = ("--text", 6, "--new-tokens", 4, "--repeats", 2, "--reference-repeats", 1, "--batch", 2)
    run(monkeypatch, "--weights", "none", "--json", file, *small)
    figures = json.loads(file.read_text())
    assert set(figures["stages"]) == {
        *OURS,
        *(f"merged_{name}" for name in ("prefill", "reason", "act")),
        "reference_reason",
        "reference_act",
    }
    for times in figures["stages"].values():
        assert 0 < times["median_ms"] <= times["p90_ms"]
    assert (figures["batch"], figures["new_tokens"]) == (2, 4)
    assert figures["reason_tokens_per_second"] == pytest.approx(8e3 / figures["stages"]["reason"]["median_ms"])
    for name in ("reason", "act"):
        ours = sum(figures["stages"][f"merged_{part}"]["median_ms"] for part in ("prefill", name))
        assert figures[f"merged_{name}_ratio"] == pytest.approx(figures["stages"][f"reference_{name}"]["median_ms"] / ours)
    assert figures["reference_reason_tokens_equal"] == 1
    assert figures["reference_act_error"] < 1e-5
    assert figures["merged_act_error"] < 1e-5
    assert "reason_ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--preset", "other"), "expected one of toy"),
        (("--new-tokens", 1), "--new-tokens: 2"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(args, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    assert "--reference-repeats" in help_without(SCRIPT, ("jax", "numpy", "equinox"))
