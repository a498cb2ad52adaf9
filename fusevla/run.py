"""A training run that has begun (see ``begin``), to its summary."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from fusevla.arrays import Batch
from fusevla.data.batch import collate
from fusevla.data.lerobot_meta import LeRobotError
from fusevla.data.loader import Loader, make_loader
from fusevla.data.mixture import Mixture
from fusevla.evaluate.machine import memory_limit, peak_memory, versions
from fusevla.evaluate.metrics import Evaluator, Figures, pick_held_out, training_mean
from fusevla.evaluate.report import plot_batch, plot_losses
from fusevla.files import write_whole
from fusevla.model.fetch import CheckpointError
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import Preset
from fusevla.train.checkpoint import BaseWeights, Checkpoints
from fusevla.train.freeze import FreezeError, count_parameters
from fusevla.train.job import abstract_frozen, run_info
from fusevla.train.loop import JsonLines, NonFiniteError, Timing, fit, read_rows
from fusevla.train.material import Material
from fusevla.train.memory import Memory, largest_of, warning
from fusevla.train.request import RequestError
from fusevla.train.startup import Clock, Compilation
from fusevla.train.state import TrainState, evaluation_leaves, step_key
from fusevla.train.step import CompiledSteps, augment_batch

EXPECTED = (RequestError, CheckpointError, LeRobotError, FreezeError, NonFiniteError, FileNotFoundError)
"""Errors whose message says what is wrong and what to do: a script prints it without a traceback."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the trained weights."""

    eval_samples: int = 64
    """Held-out samples of each kind; 0 for no held-out figures."""
    validate_every: int | None = None


@dataclasses.dataclass
class Run:
    """Everything a run consists of, ready to ``execute``."""

    out: Path
    material: Material
    base: BaseWeights
    mesh: Mesh
    state: TrainState
    frozen: Pi0Fuse
    compilation: Compilation
    clock: Clock
    options: Options
    console: Console = dataclasses.field(default_factory=Console)

    @property
    def preset(self) -> Preset:
        """As resolved for this run."""
        return self.material.preset

    def execute(self) -> dict[str, Any]:
        """Trains, evaluates, draws the pictures, writes and returns the summary."""
        start = int(self.state.step)
        evaluator = self._evaluator()
        self._say(self._introduction(start))
        validation = JsonLines(self.out / "validation.jsonl", start)
        log = JsonLines(self.out / "metrics.jsonl", start)
        validate = self._validator(evaluator, validation)
        with contextlib.closing(validation), contextlib.closing(log):
            if start == 0:
                validate(self.state, 0)
                self.clock.lap("validation")
            timing = self._fit(log, validate, start)
            final = self._final(evaluator, validation, start)
        summary = self._summary(timing, final, start)
        self._report(summary)
        return summary

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _introduction(self, start: int) -> str:
        trains, rests = count_parameters(self.state.trainable), count_parameters(abstract_frozen(self.preset))
        held_out = sum(map(len, self.material.held_out))
        resumed = f"resuming at step {start}\n" if start else ""
        return (
            f"{resumed}parameters: {trains:,} trainable (float32), {rests:,} frozen ({self.preset.train.base})\n"
            f"training frames: {len(self.material.samples):,}; held-out frames: {held_out:,}\n{self._sets()}\n"
            f"devices: {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, attention {self.frozen.config.attention}"
        )

    def _sets(self) -> str:
        """A report of each set; where there are several, with its share of the samples."""
        samples, sources = self.material.samples, self.material.training
        if not isinstance(samples, Mixture):
            return str(sources[0].report)
        total, folders = len(samples), [folder for folder, _ in self.preset.data.sets]
        parts = zip(samples.slots, folders, sources, strict=True)
        return "\n".join(f"{share / total:.0%} of the samples from {folder}\n{source.report}" for share, folder, source in parts)

    def _loader(self, start: int) -> Loader[Batch]:
        train, data = self.preset.train, self.preset.data
        return make_loader(
            self.material.samples,
            lambda samples: collate(samples, data.text_buckets, self.material.cameras),
            batch_size=train.batch_size,
            seed=train.seed,
            start_step=start,
            workers=data.workers,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def _fit(self, log: JsonLines, validate: Callable[[TrainState, int], None], start: int) -> Timing:
        train = self.preset.train
        if start >= train.steps:
            self.compilation.cancel()
            return Timing(0, 0.0, 0.0)
        info = run_info(self.material, self.base, versions())
        checkpoints = Checkpoints(self.out / "checkpoints", train.keep_checkpoints, info)
        with self._loader(start) as loader, contextlib.closing(checkpoints):
            batches, steps = self._first_batch(loader), self._compiled()
            self.state, timing = fit(
                self.state,
                self.frozen,
                steps,
                batches,
                self.mesh,
                train,
                checkpoints=checkpoints,
                log=log,
                console=self.console,
                validate=validate,
                validate_every=self.options.validate_every,
                on_first_step=lambda: self._say(self.clock.first_step()),
            )
        return timing

    def _first_batch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the first is drawn as the model will see it."""
        first = next(batches)
        picture = self.out / "batch.png"
        if not picture.exists():
            key = jax.random.split(step_key(self.state))[0]
            seen = jax.device_get(jax.jit(augment_batch, static_argnums=2)(first, key, self.preset.train.augment))
            plot_batch(seen, self.material.tokenizer, picture)
        self.clock.lap("first_batch")
        return itertools.chain([first], batches)

    def _compiled(self) -> CompiledSteps:
        """The executables, once the last of them is there."""
        steps = self.compilation.wait()
        self.clock.lap("compile")
        self._say(f"compiled the step for text buckets: {self.compilation}; no step is compiled later")
        warn(largest_of(steps.executables.values()), self.preset, self.console)
        return steps

    def _evaluator(self) -> Evaluator | None:
        if not self.material.held_out or not self.options.eval_samples:
            return None
        return Evaluator(
            pick_held_out(self.material.held_out, self.options.eval_samples),
            self.material.tokenizer,
            self.mesh,
            text_buckets=self.preset.data.text_buckets,
            mean_action=training_mean(self.material.training),
            num_steps=self.preset.num_steps,
        )

    def _validator(self, evaluator: Evaluator | None, log: JsonLines) -> Callable[[TrainState, int], None]:
        def validate(state: TrainState, step: int) -> None:
            if evaluator is not None:
                figures = evaluator.losses(evaluation_leaves(state), self.frozen)
                log.write({"step": step, **figures})
                self._say(f"held out, step {step}: {format_figures(figures)}")

        return validate

    def _final(self, evaluator: Evaluator | None, log: JsonLines, start: int) -> Figures:
        if evaluator is None:
            return {}
        self._say("evaluating on held-out episodes: thoughts decoded greedily, actions sampled ...")
        figures = evaluator.all_figures(evaluation_leaves(self.state), self.frozen)
        if start < self.preset.train.steps:
            log.write({"step": self.preset.train.steps, **figures})
        return figures

    def _summary(self, timing: Timing, final: Figures, start: int) -> dict[str, Any]:
        rows, held_out = read_rows(self.out / "metrics.jsonl"), read_rows(self.out / "validation.jsonl")
        first, last = (rows[0], rows[-1]) if rows else ({}, {})
        losses = ("loss", "text_loss", "action_loss")
        return {
            "preset": self.preset.name,
            "steps": self.preset.train.steps,
            "resumed_from": start or None,
            **{f"initial_{name}": first.get(name) for name in losses},
            **{f"final_{name}": last.get(name) for name in losses},
            "thought_exact": final.get("thought_exact"),
            "token_accuracy": final.get("token_accuracy"),
            "action_error_ratio": final.get("action_error_ratio"),
            "held_out": {"initial": held_out[0] if held_out else None, "final": final or None},
            "trainable_parameters": count_parameters(self.state.trainable),
            "frozen_parameters": count_parameters(abstract_frozen(self.preset)),
            "wall_seconds": round(self.clock.elapsed(), 2),
            "train_seconds": round(timing.seconds, 2),
            **self.clock.figures(),
            **self.compilation.figures(),
            "samples_per_second": round(timing.samples_per_second, 3),
            **peak_memory(),
            "versions": versions(),
            "paths": self._paths(),
            "run": dataclasses.asdict(self.preset),
        }

    def _paths(self) -> dict[str, str | None]:
        data = ", ".join(folder for folder, _ in self.preset.data.sets)
        names = ("metrics.jsonl", "validation.jsonl", "summary.json", "losses.png", "batch.png", "checkpoints")
        files = {name.split(".")[0]: str(self.out / name) for name in names}
        return {"out": str(self.out), "data": data, "weights": self.base.path, **files}

    def _report(self, summary: dict[str, Any]) -> None:
        plot_losses(read_rows(self.out / "metrics.jsonl"), read_rows(self.out / "validation.jsonl"), self.out / "losses.png")
        write_whole(self.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        held_out = summary["held_out"]
        lines = [
            f"finished step {summary['steps']} in {summary['wall_seconds']:.0f} s, {summary['samples_per_second']:.3g} samples/s"
        ]
        if held_out["final"]:
            before = {k: v for k, v in (held_out["initial"] or {}).items() if k != "step"}
            lines += [f"held out before: {format_figures(before)}", f"held out after:  {format_figures(held_out['final'])}"]
        lines += [f"{name}: {path}" for name, path in summary["paths"].items() if path and name != "weights"]
        self._say("\n".join(lines))


def format_figures(figures: dict[str, Any]) -> str:
    """``name value`` pairs in one line."""
    return ", ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in figures.items())


def warn(memory: Memory | None, preset: Preset, console: Console) -> None:
    """Says so where training is likely to run out of memory."""
    text = None if memory is None else warning(memory, memory_limit(), preset)
    if text is not None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
