"""The beginning of a training run: everything anew, or continued from its latest checkpoint."""

import dataclasses
from pathlib import Path
from typing import cast

import jax
from rich.console import Console

from fusevla.model.attention_choice import on_this_device
from fusevla.presets import Preset
from fusevla.run import EXPECTED, Options, Run, warn
from fusevla.train.checkpoint import RunInfo, read_info, restore_state, save_frozen
from fusevla.train.freeze import store
from fusevla.train.job import abstract_state, base_of, make_model, restore_frozen, training_key
from fusevla.train.material import Material, prepare
from fusevla.train.memory import least_memory
from fusevla.train.optim import make_optimizer
from fusevla.train.request import Request, RequestError, Resolved, conflicts, continued
from fusevla.train.sharding import check_batch_size, make_mesh, replicated
from fusevla.train.startup import Clock, Compilation
from fusevla.train.state import TrainState, init_state


def _prepared(preset: Preset, tokenizer: str, resumed: RunInfo | None = None) -> Material:
    try:
        return prepare(preset, tokenizer, resumed)
    except EXPECTED:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error


def new_run(resolved: Resolved, out: Path, options: Options) -> Run:
    """Makes everything anew. ``out`` is created once the set, the tokenizer and the weights are known to be good."""
    mesh, clock = make_mesh(), Clock()
    check_batch_size(resolved.preset.train.batch_size, mesh.size, resolved.preset.train.accumulate)
    material = _prepared(resolved.preset, resolved.tokenizer)
    preset = on_this_device(material.preset)
    clock.lap("data")
    warn(least_memory(material.preset, max(material.lengths), mesh.size), material.preset, Console())
    with Compilation(preset, material.training, material.lengths, mesh) as compilation:
        trainable, frozen = make_model(preset, resolved.weights, mesh)
        ema = preset.train.ema_decay is not None
        state = init_state(trainable, make_optimizer(preset.train), training_key(preset), ema)
        state = cast(TrainState, jax.device_put(state, replicated(mesh)))
        base = base_of(frozen, resolved.weights)
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        if base.stored:
            save_frozen(out / "checkpoints", frozen)
        frozen = store(frozen, preset.train.base)
    clock.lap("weights")
    return Run(out, material, base, mesh, state, frozen, compilation, clock, options)


def resume_run(request: Request, out: Path, options: Options) -> Run:
    """Continues the run in ``out`` from its latest complete checkpoint; flags may not change what it computes."""
    checkpoints, mesh, clock = out / "checkpoints", make_mesh(), Clock()
    info = read_info(checkpoints)
    clash = conflicts(request, info.preset)
    if clash:
        raise RequestError(
            f"--resume continues the run in {out} exactly as it began; these flags would change it: {', '.join(clash)}. "
            "Leave them out, or start a new run with another --out"
        )
    info = dataclasses.replace(info, preset=continued(request, info.preset))
    check_batch_size(info.preset.train.batch_size, mesh.size, info.preset.train.accumulate)
    material = _prepared(info.preset, "", info)
    info = dataclasses.replace(info, preset=on_this_device(info.preset))
    clock.lap("data")
    warn(least_memory(material.preset, max(material.lengths), mesh.size), material.preset, Console())
    with Compilation(info.preset, material.training, material.lengths, mesh) as compilation:
        state = restore_state(checkpoints, abstract_state(info.preset), replicated(mesh))
        frozen = store(restore_frozen(checkpoints, info, mesh), info.preset.train.base)
    clock.lap("weights")
    return Run(out, material, info.base, mesh, state, frozen, compilation, clock, options)
