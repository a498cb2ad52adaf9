"""The loop: exact resume, metrics that mean what they say, and a clear end when numbers stop being numbers."""

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from fusevla.arrays import Batch
from fusevla.presets import LIBERO10
from fusevla.train.checkpoint import BaseWeights, Checkpoints, RunInfo, complete_steps, restore_state
from fusevla.train.loop import JsonLines, NonFiniteError, Timing, fit, read_rows
from fusevla.train.sharding import replicated
from fusevla.train.state import TrainState
from tests.train.synthetic import MESH, TRAIN, compiled, fresh, random_batch

INFO = RunInfo(LIBERO10, BaseWeights(None, "", stored=False), b"tokenizer", None)


def batches(start: int) -> list[Batch]:
    return [random_batch(step) for step in range(start, 6)]


def train(out: Path, state: TrainState, data: list[Batch], **changes: Any) -> tuple[TrainState, Timing]:
    config = dataclasses.replace(TRAIN, **changes)
    out.mkdir(exist_ok=True)
    log, checkpoints = JsonLines(out / "metrics.jsonl", int(state.step)), Checkpoints(out / "checkpoints", 3, INFO)
    console = Console(file=(out / "output.txt").open("w"))
    try:
        _, frozen = fresh(TRAIN)
        return fit(state, frozen, compiled(TRAIN), iter(data), MESH, config, checkpoints=checkpoints, log=log, console=console)
    finally:
        log.close()
        checkpoints.close()
        console.file.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    out = tmp_path_factory.mktemp("whole")
    state, timing = train(out, fresh(TRAIN)[0], batches(0))
    assert timing.steps == 6
    return out, state


def losses(out: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "text_loss", "action_loss", "grad_norm", "learning_rate")
    return {row["step"]: tuple(row[name] for name in names) for row in read_rows(out / "metrics.jsonl")}


def test_every_step_is_logged_saved_and_finite(uninterrupted: tuple[Path, TrainState]) -> None:
    out, _ = uninterrupted
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6]
    assert complete_steps(out / "checkpoints") == [2, 4, 6]
    assert "step 6/6" in (out / "output.txt").read_text()
    assert all(row["samples_per_second"] > 0 for row in read_rows(out / "metrics.jsonl"))


def test_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    uninterrupted: tuple[Path, TrainState], tmp_path: Path
) -> None:
    def dies() -> Any:
        yield from batches(0)[:3]
        raise KeyboardInterrupt

    whole, expected = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", fresh(TRAIN)[0], dies())
    like = jax.eval_shape(lambda: fresh(TRAIN)[0])
    state = restore_state(tmp_path / "run" / "checkpoints", like, replicated(MESH))
    assert int(state.step) == 2
    resumed, timing = train(tmp_path / "run", state, batches(2))
    assert timing.steps == 4
    assert losses(tmp_path / "run") == losses(whole)
    for got, wanted in zip(jax.tree.leaves(resumed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_run_that_is_not_a_number_stops_and_keeps_what_was_saved(tmp_path: Path) -> None:
    bad = batches(0)
    bad[3] = dataclasses.replace(bad[3], actions=bad[3].actions * np.nan)
    with pytest.raises(NonFiniteError, match=r"step 4: expected a finite loss .* checkpoint of step 2 is complete"):
        train(tmp_path / "run", fresh(TRAIN)[0], bad, log_every=5)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]


def test_metrics_of_absent_parts_are_null(tmp_path: Path) -> None:
    only_text = [dataclasses.replace(batch, diffusion_loss_mask=np.zeros(4, bool)) for batch in batches(0)]
    train(tmp_path / "run", fresh(TRAIN)[0], only_text, steps=2)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["action_loss"] is None
    assert rows[0]["text_loss"] is not None


def test_validation_is_called_between_steps(tmp_path: Path) -> None:
    seen: list[int] = []
    screen = io.StringIO()
    out = tmp_path / "run"
    out.mkdir()
    log, checkpoints = JsonLines(out / "metrics.jsonl", 0), Checkpoints(out / "checkpoints", 1, INFO)
    state, frozen = fresh(TRAIN)
    fit(
        state, frozen, compiled(TRAIN), itertools.cycle(batches(0)), MESH, TRAIN,
        checkpoints=checkpoints, log=log, console=Console(file=screen, force_terminal=True),
        validate=lambda _, step: seen.append(step), validate_every=3,
    )  # fmt: skip
    log.close()
    checkpoints.close()
    assert seen == [3]
    assert "samples/s" in screen.getvalue()


def test_lines_after_the_checkpoint_and_half_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = JsonLines(path, 2)
    log.write({"step": 3, "again": True})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
