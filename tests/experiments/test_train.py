"""experiments/train.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("--preset", "libero10", "--model", "tiny", "--weights", "none", "--batch", "2", "--eval-samples", "4")


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiments" / "train.py"), *flags]


def environment(cache: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("XLA")}
    no_network = {"https_proxy": "http://127.0.0.1:9", "FUSEVLA_CACHE": str(cache), "OPENPI_DATA_HOME": str(cache)}
    return {**clean, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **no_network}


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=1200)


def test_help_is_quick_and_names_every_flag(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert time.perf_counter() - start < 30  # 1 s alone; machines that run tests are busy
    names = "preset data weights model tokenizer batch steps freeze norm seed save-every log-every out resume"
    assert all(f"--{name}" in done.stdout for name in names.split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'experiments' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'equinox', 'torch', 'lerobot', 'grain', 'orbax', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(ROOT), capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_libero10_without_anything_says_all_of_it_at_once(tmp_path: Path) -> None:
    done = run(tmp_path, "--preset", "libero10")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("data: no --data", "reasoning annotations", "base weights", "PaliGemma tokenizer", "With it:", "10000 steps"):
        assert part in done.stderr


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    done = run(tmp_path, *FLAGS, "--out", "run")
    assert done.returncode == 1
    assert "exists and is not empty: continue it with --resume" in done.stderr
    assert "holds no checkpoints" in run(tmp_path, "--resume", "--out", "run").stderr
    assert "--preset is needed" in run(tmp_path).stderr


def rows(out: Path) -> dict[int, tuple[float, ...]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["text_loss"], row["action_loss"], row["grad_norm"]) for row in lines}


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path: Path, libero_sample: Path) -> None:
    flags = (*FLAGS, "--data", str(libero_sample), "--steps", "24", "--save-every", "5", "--log-every", "1")
    whole = run(tmp_path, *flags, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command(*flags, "--out", "killed"), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"step": 13' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = run(tmp_path, "--resume", "--out", "killed", "--eval-samples", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    for name in ("thought_exact", "token_accuracy", "action_error_ratio", "held_out", "initial_loss", "final_loss"):
        assert summaries[0][name] == summaries[1][name]
    for name in ("losses.png", "batch.png", "validation.jsonl"):
        assert (tmp_path / "killed" / name).stat().st_size > 0
    clash = run(tmp_path, "--resume", "--out", "killed", "--steps", "99")
    assert "--steps 99 (the run has 24)" in clash.stderr
