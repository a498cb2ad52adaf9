"""From the command to the first step: the step compiles while the weights load, and where the seconds went is told."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
from jax.sharding import Mesh

from fusevla.arrays import Batch
from fusevla.data.batch import Sample, collate
from fusevla.data.loader import Source
from fusevla.presets import Preset
from fusevla.train.job import abstract_state, abstract_stored
from fusevla.train.sharding import replicated
from fusevla.train.step import CompiledSteps

PARTS = ("imports", "data", "weights", "validation", "compile", "first_batch", "first_step")
"""In the order of a run. ``compile`` is what was waited for once the weights were there: the rest ran beside them."""


def process_age() -> float:
    """Seconds since this process began, the interpreter's own start included; 0 where the system does not tell (not Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class Clock:
    """Seconds of each part of a start, from the beginning of the process to the end of the first step.

    Whatever came before it was made is ``imports``: the interpreter's start, ours, and the device's.
    """

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter() - process_age()
        self.seconds: dict[str, float] = {}
        self.total: float | None = None
        self.lap("imports")

    def lap(self, part: str) -> None:
        """What went by since the last lap was ``part`` (one of ``PARTS``)."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return time.perf_counter() - self._began

    def first_step(self) -> str:
        """The first step is done; says how long everything took."""
        self.lap("first_step")
        self.total = self._last - self._began
        parts = ", ".join(f"{part.replace('_', ' ')} {self.seconds[part]:.1f}" for part in PARTS if part in self.seconds)
        return f"first step {self.total:.1f} s after the command ({parts})"

    def figures(self) -> dict[str, Any]:
        """For the summary; nulls where no step was taken."""
        return {
            "seconds_to_first_step": None if self.total is None else round(self.total, 2),
            "seconds_to_first_step_by_part": {part: round(self.seconds[part], 2) for part in PARTS if part in self.seconds},
        }


def example_batch(preset: Preset, sets: Sequence[Source[Sample]]) -> Batch:
    """Shapes of a batch over all devices, with the cameras of all sets: those of one real sample of each."""
    size = preset.train.batch_size
    few = collate([samples(0, 0, preset.train.seed) for samples in sets], preset.data.text_buckets)
    return cast(Batch, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), few))


class Compilation:
    """The step's executables in the making, in a thread: XLA works without the interpreter's lock.

    Leave ``with`` by an exception (weights that cannot be read, say) and what has not begun to compile never will; the
    exception is not replaced by one of the compiler's.
    """

    def __init__(self, preset: Preset, sets: Sequence[Source[Sample]], lengths: Sequence[int], mesh: Mesh) -> None:
        self._preset, self._sets, self._lengths, self._mesh = preset, sets, lengths, mesh
        self.steps = CompiledSteps(preset.train, mesh, preset.data.mask_padded_actions)
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(1, "compile")
        self._done: Future[None] | None = None

    def __enter__(self) -> "Compilation":
        self._done = self._pool.submit(self._compile)
        self._pool.shutdown(wait=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.cancel()

    def cancel(self) -> None:
        """What has not begun to compile never will; what has, a process waits for before it ends."""
        self._cancelled.set()

    def _compile(self) -> None:
        preset, everywhere = self._preset, replicated(self._mesh)
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        state, frozen = jax.tree.map(place, (abstract_state(preset), abstract_stored(preset)))
        batch = example_batch(preset, self._sets)
        self.steps.compile(state, frozen, batch, self._lengths, self._cancelled.is_set)

    def wait(self) -> CompiledSteps:
        """The executables, all of them. Raises what compiling raised."""
        assert self._done is not None
        self._done.result()
        return self.steps

    def figures(self) -> dict[str, Any]:
        """For the summary: seconds in the thread, whatever ran beside it."""
        seconds = self.steps.seconds
        return {
            "compile_seconds": round(sum(seconds.values()), 2),
            "compile_seconds_by_text_bucket": {str(length): round(value, 2) for length, value in seconds.items()},
        }

    def __str__(self) -> str:
        return ", ".join(f"{length} ({seconds:.1f} s)" for length, seconds in self.steps.seconds.items())
