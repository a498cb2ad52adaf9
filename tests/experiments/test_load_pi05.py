"""The two scripts around openpi checkpoints, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return execute([f"experiments/{script}.py", *args])


def execute(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command, path = [sys.executable, *arguments], {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "random"
    result = run("write_random_pi05", "--out", str(out), "--model", "tiny", "--trailing-value")
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stdout
    return out


def test_the_script_reads_shows_and_reports(weights, tmp_path) -> None:
    options = ("--dtype", "training", "--no-forward", "--json", str(tmp_path / "r.json"))
    result = run("load_pi05", "--weights", str(weights), *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["read"]["leaves"] == 51
    assert report["fresh_lora"] == ["language", "action"]
    assert report["parameters"] == report["trainable"] + report["frozen"] == sum(row["parameters"] for row in report["groups"])
    assert {(row["dtype"], row["trainable"]) for row in report["groups"]} == {("float32", True), ("bfloat16", False)}
    assert report["memory_after_load"]["peak_host_bytes"] > 0
    for group in ("image tower", "embedder", "language expert", "action expert", "action heads"):
        assert group in result.stdout
    assert "peak host memory" in result.stdout


@pytest.mark.slow
def test_the_forward_pass_is_finite(weights, tmp_path) -> None:
    result = run("load_pi05", "--weights", str(weights), "--json", str(tmp_path / "r.json"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["forward"]["finite"]
    assert report["memory_after_forward"]["peak_host_bytes"] >= report["memory_after_load"]["peak_host_bytes"]


def test_errors_are_messages_without_a_traceback(weights, tmp_path) -> None:
    nothing = run("load_pi05", "--weights", str(tmp_path))
    wrong = run("load_pi05", "--weights", str(weights), "--model", "full")
    for result, words in ((nothing, "not an openpi checkpoint"), (wrong, "50 misshapen")):
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_a_folder_is_never_overwritten(weights) -> None:
    result = run("write_random_pi05", "--out", str(weights), "--model", "tiny")
    assert result.returncode == 1
    assert "exists" in result.stderr


@pytest.mark.parametrize("script", ["load_pi05", "write_random_pi05"])
def test_help_imports_nothing_heavy(script) -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path('experiments/{script}.py', run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit(any(name in sys.modules for name in ('jax', 'orbax', 'torch', 'lerobot')))"
    result = execute(["-c", code])
    assert result.returncode == 0, result.stderr
    assert "--weights" in result.stdout or "--out" in result.stdout
