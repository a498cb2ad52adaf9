"""The benchmark of the input pipeline: its keys, what it says without lerobot, and bad input."""

import importlib.util
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.data import lerobot_sets as sets
from tests.experiments.help_text import help_without

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "experiments" / "bench_data.py")
SMALL = ("--batch", "2", "--batches", "2", "--repeats", "1")


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_without_lerobot_our_side_alone_is_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lerobot", None)
    root = sets.write(tmp_path / "set")
    run(monkeypatch, "--data", root, "--workers", 0, "--json", tmp_path / "bench.json", *SMALL)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["frames"] == sum(sets.LENGTHS)
    for key in ("samples_per_second", "samples_per_second_per_core", "first_batch_seconds", "augmentation_ms_per_sample"):
        assert figures[key] > 0
    for key in ("reference_samples_per_second", "ratio", "ratio_as_read", "ratio_resized"):
        assert figures[key] is None
    assert 'pip install "fusevla[lerobot]"' in figures["without_reference"]
    assert figures["without_reference"] in capsys.readouterr().out


@pytest.fixture(scope="module")
def bench() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("bench_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_data"] = module
    spec.loader.exec_module(module)
    return module


def test_figures_are_medians_and_ratios_of_medians(bench: Any) -> None:
    windows = {
        "ours": [bench.Window(1.0, rate, 2 * rate) for rate in (90.0, 100.0, 500.0)],
        "with chunks": [bench.Window(1.0, 10.0, 5.0)],
        "as read": [bench.Window(1.0, rate, 50.0) for rate in (49.0, 1.0, 50.0)],
    }
    figures = bench.summarize(windows)
    assert figures["samples_per_second"] == 100
    assert figures["reference_samples_per_second"] == 10
    assert (figures["ratio"], figures["ratio_per_core"]) == (10, 40)
    assert (figures["reference_as_read_samples_per_second"], figures["ratio_as_read_per_core"]) == (49, 4)
    assert figures["ratio_resized"] is None


def test_sets_that_lerobot_cannot_read_are_named(bench: Any, tmp_path) -> None:
    assert bench.as_v30(tmp_path, "v3.0", tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"neither reads nor converts v2.0"):
        bench.as_v30(tmp_path, "v2.0", tmp_path)


def test_bad_input_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--data", tmp_path / "nowhere")
    assert caught.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    assert "--workers" in help_without(SCRIPT, ("jax", "pyarrow", "numpy", "torch"))


@pytest.mark.slow
def test_both_sides_are_measured_where_lerobot_is_installed(libero_sample, tmp_path) -> None:
    """In a process of its own: importing torch and lerobot warns."""
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("needs lerobot")
    command = [sys.executable, SCRIPT, "--data", str(libero_sample), "--json", str(tmp_path / "bench.json"), *SMALL]
    subprocess.run([*command, "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["without_reference"] is None
    assert figures["ratio"] == figures["samples_per_second"] / figures["reference_samples_per_second"] > 1
    assert figures["ratio_as_read"] > 0
    assert figures["ratio_resized"] > 0
