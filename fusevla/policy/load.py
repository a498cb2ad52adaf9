"""Trained models from the folders of their runs, and the base that a run begins with."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from fusevla.model.attention_choice import on_this_device
from fusevla.model.fuse import Pi0Fuse
from fusevla.train.checkpoint import RunInfo, read_info, restore_state
from fusevla.train.job import abstract_state, base_of, combine, make_model, restore_frozen, run_info
from fusevla.train.material import prepare
from fusevla.train.request import Resolved
from fusevla.train.sharding import make_mesh, replicated
from fusevla.train.state import evaluation_leaves

__all__ = ["checkpoints_folder", "load_base", "load_policy"]


def checkpoints_folder(folder: str | Path) -> Path:
    """Where a run keeps its checkpoints, given its folder or that very one."""
    inside = Path(folder).expanduser() / "checkpoints"
    return inside if inside.is_dir() else Path(folder).expanduser()


def load_policy(folder: str | Path, step: int | None = None) -> tuple[Pi0Fuse, RunInfo]:
    """The trained model (the average where one was kept), its preset, tokenizer and statistics, from the folder alone.

    ``folder`` is a run's, or the checkpoints folder in it; without ``step`` the latest checkpoint is taken.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged or not complete.
    """
    checkpoints, mesh = checkpoints_folder(folder), make_mesh(jax.devices()[:1])
    info = read_info(checkpoints, step)
    info = dataclasses.replace(info, preset=on_this_device(info.preset))
    state = restore_state(checkpoints, abstract_state(info.preset), replicated(mesh), step)
    model = combine(evaluation_leaves(state), restore_frozen(checkpoints, info, mesh))
    return jax.tree.map(jnp.asarray, model), info


def load_base(resolved: Resolved) -> tuple[Pi0Fuse, RunInfo]:
    """The model that a run of this request would begin with, and its info: what fine-tuning is compared with.

    Raises:
        ValueError: what a new run raises about its set, tokenizer or weights.
        FileNotFoundError: one of them is not there.
    """
    material, mesh = prepare(on_this_device(resolved.preset), resolved.tokenizer), make_mesh(jax.devices()[:1])
    trainable, frozen = make_model(material.preset, resolved.weights, mesh)
    return combine(trainable, frozen), run_info(material, base_of(frozen, resolved.weights), {})
