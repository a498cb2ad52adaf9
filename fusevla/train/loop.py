"""The loop around the step: batches in, metrics and checkpoints out, and the device never waits for the host."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusevla.arrays import Batch
from fusevla.files import write_whole
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import TrainConfig
from fusevla.train.checkpoint import Checkpoints
from fusevla.train.sharding import put_batch
from fusevla.train.state import TrainState
from fusevla.train.step import CompiledSteps, Metrics

MAX_AHEAD = 16
"""Steps that the host may run ahead of the device: bounds the batches that wait in device memory."""
PARTS = {"text_loss": "text_share", "action_loss": "action_share", "token_accuracy": "text_share"}
"""Metrics that mean nothing in a batch without samples of their kind."""

Validate = Callable[[TrainState, int], None]
Row = dict[str, float | int | None]


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or infinite."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file; [] where it does not exist. A line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class JsonLines:
    """A .jsonl file with a ``step`` in each line, continued after ``step``: later lines of a killed run are dropped."""

    def __init__(self, path: Path, step: int):
        rows = [row for row in read_rows(path) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line; it is on disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Display:
    """A progress bar on a terminal, a plain line per logged step elsewhere."""

    def __init__(self, console: Console, start: int, steps: int):
        self._console = console
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[figures]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("train", total=steps, completed=start, figures="")
        self._steps, self._began, self._start = steps, time.perf_counter(), start

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, row: Row) -> None:
        """The figures of a logged step."""
        step = int(row["step"] or 0)
        figures = " ".join(f"{name} {_short(row[key])}" for name, key in _SHOWN.items())
        self._progress.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal:
            left = (time.perf_counter() - self._began) / max(step - self._start, 1) * (self._steps - step)
            self._console.print(f"step {step}/{self._steps}  {figures}  {left:.0f} s left", highlight=False, soft_wrap=True)


_SHOWN = {"loss": "loss", "text": "text_loss", "action": "action_loss", "samples/s": "samples_per_second"}


def _short(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@dataclasses.dataclass
class Recorder:
    """Keeps metrics on the device until a step is logged, then checks, writes and shows them."""

    config: TrainConfig
    log: JsonLines
    display: Display
    saved: Callable[[], str]
    """Says what a failed run leaves behind."""
    pending: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    since: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a finished (or still running) step without waiting for it."""
        self.pending.append((step, metrics))
        if len(self.pending) > MAX_AHEAD:
            jax.block_until_ready(self.pending[-MAX_AHEAD][1]["loss"])

    def flush(self) -> None:
        """Fetches everything pending. Raises ``NonFiniteError`` at the first step that is not a number."""
        if not self.pending:
            return
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        rate = len(fetched) * self.config.batch_size / max(time.perf_counter() - self.since, 1e-9)
        for (step, _), metrics in zip(self.pending, fetched, strict=True):
            self._check(step, metrics)
            if step == 1 or step % self.config.log_every == 0 or step == self.config.steps:
                row = {**_row(step, metrics), "samples_per_second": round(rate, 3), "time": round(time.time(), 3)}
                self.log.write(row)
                self.display.show(row)
        self.pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """What follows does not count what came before (validation, say)."""
        self.since = time.perf_counter()

    def _check(self, step: int, metrics: Metrics) -> None:
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            return
        figures = ", ".join(f"{name} {float(value):.6g}" for name, value in sorted(metrics.items()))
        raise NonFiniteError(
            f"step {step}: expected a finite loss and gradient, got {figures}. Nothing was saved from this state; "
            f"{self.saved()}. A lower peak learning rate, a longer warm-up, or float32 compute usually helps; "
            "extreme values in the set's actions (see its statistics) are the other common cause"
        )


def _row(step: int, metrics: Metrics) -> Row:
    values: Row = {name: float(value) for name, value in metrics.items()}
    absent = {part: None for part, share in PARTS.items() if not values.get(share, 1.0)}
    return {"step": step, **values, **absent}


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a run took, from its start or from where it was resumed."""

    steps: int
    seconds: float
    samples_per_second: float


def fit(
    state: TrainState,
    frozen: Pi0Fuse,
    steps: CompiledSteps,
    batches: Iterator[Batch],
    mesh: Mesh,
    config: TrainConfig,
    *,
    checkpoints: Checkpoints,
    log: JsonLines,
    console: Console,
    validate: Validate | None = None,
    validate_every: int | None = None,
    on_first_step: Callable[[], None] = lambda: None,
) -> tuple[TrainState, Timing]:
    """Trains from the state's step to ``config.steps``; the last step is always saved.

    ``batches`` starts at the state's step. ``validate`` is called with (state, step) every ``validate_every`` steps, not at
    the end; ``on_first_step`` when the first step of this call is done. Raises ``NonFiniteError`` (earlier checkpoints stay),
    and whatever ``batches`` raises.
    """
    start = int(state.step)
    began, paused = time.perf_counter(), 0.0
    last_saved = start
    with Display(console, start, config.steps) as display:
        saved = lambda: f"the checkpoint of step {last_saved} is complete" if last_saved else "no checkpoint was due yet"
        recorder = Recorder(config, log, display, saved)
        for step in range(start + 1, config.steps + 1):
            state, metrics = steps(state, frozen, put_batch(next(batches), mesh))
            recorder.add(step, metrics)
            save = step % config.save_every == 0 or step == config.steps
            if save or step % config.log_every == 0 or step == start + 1:
                recorder.flush()
            if step == start + 1:
                on_first_step()
            if save:
                checkpoints.save(step, state)
                last_saved = step
            if validate and validate_every and step % validate_every == 0 and step != config.steps:
                pause = time.perf_counter()
                validate(state, step)
                paused += time.perf_counter() - pause
                recorder.restart_clock()
    seconds = time.perf_counter() - began - paused
    done = config.steps - start
    return state, Timing(done, seconds, done * config.batch_size / max(seconds, 1e-9) if done else 0.0)
