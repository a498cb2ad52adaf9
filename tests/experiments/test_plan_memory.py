"""The planner of memory as a user runs it; what is compiled is replaced by a sum, but for one small plan."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

from experiments import plan_memory
from fusevla.presets import PRESETS, Preset
from fusevla.train.memory import Memory
from tests.experiments.help_text import help_without
from tests.train.synthetic import MODEL

SCRIPT = str(Path(plan_memory.__file__))
GB = 10**9


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    plan_memory.main()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Preset]:
    """Every preset that was "compiled": 12 GB and 1 for each sample at a time, 3 less with int8, 5 without the image tower."""
    presets = []

    def fake(preset: Preset, batch_size: int, text_length: int, devices: int) -> Memory:
        assert text_length == 192
        presets.append(preset)
        train = preset.train
        saved = 3 * (train.base == "int8") + 5 * (train.freeze == "all_but_lora")
        return Memory((12 - saved) * GB, batch_size // devices // train.accumulate * GB)

    monkeypatch.setattr("fusevla.train.memory.planned_memory", fake)
    return presets


def test_a_batch_that_fits(asked, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "plan.json"
    run(monkeypatch, "--preset", "libero10", "--gpu", 24, "--json", file)
    figures = json.loads(file.read_text())
    assert figures["fits"]
    assert figures["largest_batch"] == 10
    assert figures["usable_bytes"] == 22_200_000_000
    assert figures["together"] is None
    assert {size["batch"]: size["fits"] for size in figures["batches"]} == {4: True, 8: True, 10: True, 11: False}
    assert all(size["total_bytes"] == (12 + size["batch"]) * GB for size in figures["batches"])
    assert figures["versions"]["jax"] == jax.__version__
    assert figures["backend"] == "cpu"
    assert len(asked) == len(set(asked)), "something was compiled twice"
    out, err = capsys.readouterr()
    assert "batch 4 fits; the largest that fits is 10" in out
    assert "compiled for cpu" in out
    assert "95% less 0.6 GB" in out
    assert "s left" in err


def test_a_batch_that_does_not_fit_says_what_would_help(asked, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "plan.json"
    run(monkeypatch, "--preset", "libero10", "--gpu", 24, "--batch", 12, "--json", file)
    figures = json.loads(file.read_text())
    assert not figures["fits"]
    assert figures["largest_batch"] == 10
    enough = [lever["flags"] for lever in figures["levers"] if lever["fits"]]
    assert enough == [["--accumulate 2"], ["--base int8"], ["--freeze all_but_lora"]]
    assert "batch 12 fits with --accumulate 2; or --base int8; or --freeze all_but_lora" in capsys.readouterr().out


def test_levers_are_put_together_where_none_is_enough(asked, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "plan.json"
    run(monkeypatch, "--preset", "libero10", "--gpu", 8, "--batch", 4, "--json", file)
    figures = json.loads(file.read_text())
    assert figures["largest_batch"] == 0
    assert figures["together"]["flags"] == ["--accumulate 4", "--base int8", "--freeze all_but_lora"]
    assert figures["together"]["total_bytes"] == 5 * GB
    out = capsys.readouterr().out
    assert "the largest that fits is none at all" in out
    assert "batch 4 fits with --accumulate 4 --base int8 --freeze all_but_lora" in out


def test_nothing_helps_on_a_small_gpu(asked, monkeypatch, capsys) -> None:
    run(monkeypatch, "--preset", "libero10", "--gpu", 2)
    assert "fits with none of these flags" in capsys.readouterr().out
    run(monkeypatch, "--preset", "libero10", "--gpu", 2, "--no-levers")
    assert "batch 4 does not fit" in capsys.readouterr().out


def test_flags_change_the_preset(asked, tmp_path, monkeypatch) -> None:
    file = tmp_path / "plan.json"
    flags = ("--batch", 8, "--devices", 2, "--accumulate", 2, "--freeze", "all_but_lora", "--remat", "dots", "--base", "int8")
    run(monkeypatch, "--preset", "libero10", "--gpu", 24, *flags, "--no-levers", "--json", file)
    train = asked[0].train
    assert (train.batch_size, train.accumulate, train.freeze, train.base) == (8, 2, "all_but_lora", "int8")
    assert asked[0].model.remat == "dots"
    figures = json.loads(file.read_text())
    assert figures["levers"] == []
    assert figures["batches"][0]["total_bytes"] == 6 * GB
    assert all(size["batch"] % 4 == 0 for size in figures["batches"])
    assert figures["largest_batch"] == 4 * 18


@pytest.mark.slow
def test_a_real_plan(tmp_path, monkeypatch) -> None:
    toy = PRESETS["toy"]
    small = dataclasses.replace(toy, model=MODEL, train=dataclasses.replace(toy.train, batch_size=2, augment=None))
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr("fusevla.train.memory.RESERVE", 0)
    file = tmp_path / "plan.json"
    run(monkeypatch, "--preset", "toy", "--gpu", 0.002, "--no-levers", "--json", file)
    figures = json.loads(file.read_text())
    sizes = {size["batch"]: size["total_bytes"] for size in figures["batches"]}
    assert figures["text_length"] == 64
    assert sizes[figures["largest_batch"]] <= figures["usable_bytes"] < sizes[figures["largest_batch"] + 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--preset", "libero10", "--gpu", 0), "--gpu: expected the memory of a GPU in GB"),
        (("--preset", "libero11", "--gpu", 24), "--preset: expected one of toy"),
        (("--preset", "libero10", "--gpu", 24, "--batch", 0), "--batch: expected at least 1"),
        (("--preset", "libero10", "--gpu", 24, "--devices", 0), "--devices, --text-length: expected at least 1"),
        (("--preset", "libero10", "--gpu", 24, "--text-length", 0), "--devices, --text-length: expected at least 1"),
        (("--preset", "libero10", "--gpu", 24, "--devices", 3), "--batch: expected a multiple of 3"),
        (("--preset", "libero10", "--gpu", 24, "--accumulate", 8), "multiple of 8"),
        (("--preset", "libero10", "--gpu", 24, "--lora", "False", "--freeze", "all_but_lora"), "neither expert carries LoRA"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(args, message, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *args)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_help_imports_nothing_heavy() -> None:
    assert "--gpu" in help_without(SCRIPT, ("jax", "numpy", "equinox"))
