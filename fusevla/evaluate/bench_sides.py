"""Ours and the reference, each with its batches and its executables, for a benchmark that lets them take turns."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from fusevla.arrays import Batch
from fusevla.evaluate.flops import Workload, train_flops
from fusevla.evaluate.reference_step import reference_batch, reference_loss, reference_step
from fusevla.losses import joint_loss
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import Base, Preset, TrainConfig
from fusevla.train.freeze import store
from fusevla.train.sharding import make_mesh, replicated
from fusevla.train.state import TrainState
from fusevla.train.step import abstract_batch, train_step


@dataclasses.dataclass
class Side:
    """One way to train: its batches, its executables by text length, and what they took."""

    batches: list[Batch]
    config: TrainConfig
    base: Base | None
    """How it stores frozen weights; None: as plain arrays."""
    step: Callable[..., Any]
    loss: Callable[..., Any]
    flops: float
    state: Any = None
    frozen: Any = None
    compiled: dict[int, Any] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    forward: Callable[[], Any] | None = None
    first: dict[str, float] | None = None
    taken: list[list[float]] = dataclasses.field(default_factory=list)
    forward_taken: list[float] = dataclasses.field(default_factory=list)

    def begin(self, state: TrainState, frozen: Pi0Fuse) -> None:
        """Takes what it starts from, concrete or abstract; an executable for every text length among the batches.

        The state is donated, as in training.
        """
        self.state, self.frozen = state, frozen if self.base is None else store(frozen, self.base)
        everywhere = replicated(make_mesh(jax.devices()[:1]))
        jitted = jax.jit(self.step, donate_argnums=0)
        for length in sorted({text_length(batch) for batch in self.batches}):
            began = time.perf_counter()
            batch = abstract_batch(self.batches[0], length, everywhere)
            self.compiled[length] = jitted.lower(self.state, self.frozen, batch).compile()
            self.compile_seconds = max(self.compile_seconds, time.perf_counter() - began)

    def run(self, batch: Batch) -> tuple[float, dict[str, Any]]:
        """Seconds of a step, and its metrics."""
        began = time.perf_counter()
        self.state, metrics = self.compiled[text_length(batch)](self.state, self.frozen, batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began, metrics


def text_length(batch: Batch) -> int:
    """Tokens that the texts of a batch are padded to."""
    return int(batch.observation.tokens.shape[1])


def make_sides(preset: Preset, batches: list[Batch], *, reference: bool) -> dict[str, Side]:
    """Both ways to train on the same samples; the reference stores nothing in another form, whatever the preset says."""
    config, size, cameras = preset.train, preset.train.batch_size, len(preset.data.cameras)
    longest, head = max(map(text_length, batches)), max(int(batch.token_loss_mask.sum()) for batch in batches)
    count = partial(train_flops, preset.model, config.freeze)
    loss = lambda *inputs: joint_loss(*inputs)[0]
    flops = count(Workload(size, cameras, longest, head))
    sides = {"ours": Side(batches, config, config.base, partial(train_step, config=config), loss, flops)}
    if reference:
        wide, plain = [reference_batch(batch) for batch in batches], dataclasses.replace(config, moments="float32")
        length = text_length(wide[0])
        flops = count(Workload(size, cameras + 1, length, size * (length - 1)), recomputed=True)
        sides["reference"] = Side(wide, plain, None, partial(reference_step, config=plain), reference_loss, flops)
    return sides
