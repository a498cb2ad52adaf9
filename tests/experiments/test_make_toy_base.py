"""The script behind the package's toy base: both stages, resuming, and a result that the toy preset can load."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusevla.model.openpi import load_params
from fusevla.presets import TOY_MODEL
from fusevla.tokens.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FEW = {"see-steps": 120, "decay-steps": 1, "warmup-steps": 1, "episodes": 8, "held-out": 4, "eval-every": 2}


def make(out: Path, *flags: str) -> None:
    script = str(ROOT / "experiments" / "make_toy_base.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, "--out", str(out), *(f"--{name}={value}" for name, value in FEW.items()), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_both_stages_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "base"
    make(out, "--steps", "2")
    make(out, "--steps", "4", "--resume")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "move"] == [2, 4]
    losses = [line["place_loss"] for line in lines if line["stage"] == "see"]
    assert losses[-1] < losses[0]
    vocabulary = load_tokenizer(out / "tokenizer.model").vocab_size
    load_params(out / "params", dataclasses.replace(TOY_MODEL, vocab_size=vocabulary))
