"""The device side of a run: the model with its base weights, and what a checkpoint says about where they came from."""

import functools
from pathlib import Path
from typing import cast

import equinox as eqx
import jax
from jax.sharding import Mesh

from fusevla.data.normalize import stats_to_json
from fusevla.model import fuse
from fusevla.model.fetch import CheckpointError, find_params
from fusevla.model.fuse import Pi0Fuse
from fusevla.model.openpi import load_params
from fusevla.presets import Preset
from fusevla.train.checkpoint import BaseWeights, RunInfo, fingerprint, load_frozen
from fusevla.train.freeze import count_parameters, dtype_spec, partition, store
from fusevla.train.material import Material
from fusevla.train.optim import make_optimizer
from fusevla.train.sharding import replicate, replicated
from fusevla.train.state import TrainState, init_state

STORE_BELOW = 256 * 2**20
"""Frozen leaves of fewer bytes are stored with the checkpoints, so that these stand alone."""


def model_key(preset: Preset) -> jax.Array:
    """The key of random weights and fresh adapters."""
    return jax.random.fold_in(jax.random.key(preset.train.seed), 1)


def training_key(preset: Preset) -> jax.Array:
    """The base key of the run."""
    return jax.random.fold_in(jax.random.key(preset.train.seed), 2)


def make_model(preset: Preset, weights: str | None, mesh: Mesh) -> tuple[Pi0Fuse, Pi0Fuse]:
    """(trainable, frozen) on all devices of ``mesh``, from a checkpoint in openpi's layout or (``None``) random.

    Loading goes straight to float32 (trainable) and bfloat16 (frozen).
    """
    config, mode = preset.model, preset.train.freeze
    if weights is None:
        # Compiled for one use only: on a CPU, optimising the many random-number kernels takes longer than running them.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make = jax.jit(functools.partial(fuse.init, config), out_shardings=replicated(mesh), compiler_options=options)
        model = make(model_key(preset))
    else:
        dtypes = dtype_spec(fuse.abstract(config), mode)
        model = load_params(weights, config, dtypes, replicated(mesh), key=model_key(preset))
    trainable, frozen = partition(model, mode)
    return replicate(trainable, mesh), replicate(frozen, mesh)


def frozen_bytes(frozen: Pi0Fuse) -> int:
    """Size of the frozen leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))


def base_of(frozen: Pi0Fuse, weights: str | None) -> BaseWeights:
    """Where the frozen leaves can be found again; they are stored where they are small, or come from nowhere else."""
    path = None if weights is None else str(find_params(weights))
    some = count_parameters(frozen) > 0
    return BaseWeights(path, fingerprint(frozen), stored=some and (path is None or frozen_bytes(frozen) <= STORE_BELOW))


def run_info(material: Material, base: BaseWeights, versions: dict[str, str]) -> RunInfo:
    """What every checkpoint of the run carries beside its arrays."""
    stats = None if material.stats is None else stats_to_json(material.stats)
    return RunInfo(material.preset, base, material.tokenizer.model_bytes, stats, versions)


def restore_frozen(checkpoints: Path, info: RunInfo, mesh: Mesh) -> Pi0Fuse:
    """The frozen leaves of a run, from beside its checkpoints or from the base weights, verified by their fingerprint.

    Raises ``CheckpointError`` where they are gone or not the same.
    """
    like = abstract_frozen(info.preset)
    if not jax.tree.leaves(like):
        return like
    if info.base.stored:
        frozen = load_frozen(checkpoints, like, replicated(mesh))
    elif info.base.path is None:
        raise CheckpointError(f"{checkpoints}: the frozen leaves were neither stored nor loaded from a path; start the run again")
    else:
        _, frozen = make_model(info.preset, info.base.path, mesh)
    found = fingerprint(frozen)
    if found != info.base.fingerprint:
        raise CheckpointError(
            f"{info.base.path or checkpoints}: expected the frozen leaves this run began with (fingerprint "
            f"{info.base.fingerprint}), got others ({found}); put the same base weights back"
        )
    return frozen


def abstract_trainable(preset: Preset) -> Pi0Fuse:
    """Shapes of the trainable leaves."""
    return partition(fuse.abstract(preset.model), preset.train.freeze)[0]


def abstract_frozen(preset: Preset) -> Pi0Fuse:
    """Shapes of the frozen leaves."""
    return partition(fuse.abstract(preset.model), preset.train.freeze)[1]


def abstract_stored(preset: Preset) -> Pi0Fuse:
    """Shapes of the frozen leaves as training keeps them."""
    return store(abstract_frozen(preset), preset.train.base)


def abstract_state(preset: Preset) -> TrainState:
    """Shapes of a run's state."""
    ema, optimizer = preset.train.ema_decay is not None, make_optimizer(preset.train)
    make = lambda trainable: init_state(trainable, optimizer, training_key(preset), ema)
    return cast(TrainState, jax.eval_shape(make, abstract_trainable(preset)))


def combine(trainable: Pi0Fuse, frozen: Pi0Fuse) -> Pi0Fuse:
    """The whole model."""
    return eqx.combine(trainable, frozen)
