"""Asynchronous, atomic checkpoints from which a run continues bit for bit and a policy can be rebuilt.

Layout of ``OUT/checkpoints``::

    <step>/arrays    trainable leaves, optimizer, average, step, key; the tokenizer's bytes; a checksum of every array
    <step>/info      JSON: preset, normalisation statistics, where the frozen leaves come from, versions
    frozen/          the frozen leaves, once, where they cannot be read again from the base weights (or are small)

The data order is a function of the seed and the step, so the step is its position too. Orbax writes each folder under
another name and renames it when complete: a killed run leaves complete checkpoints only.
"""

import contextlib
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fusevla.arrays import Array, Int
from fusevla.model.fetch import CheckpointError
from fusevla.preset_json import preset_from_dict
from fusevla.presets import Preset

T = TypeVar("T")
FORMAT = 1
FROZEN = "frozen"
CHECKSUMS = "checksums"
TOKENIZER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class BaseWeights:
    """Where the frozen leaves come from."""

    path: str | None
    """An openpi ``params`` folder, or None where the run began from random weights."""
    fingerprint: str
    """Of the frozen leaves, see ``fingerprint``; of no leaves where nothing is frozen."""
    stored: bool
    """Whether ``checkpoints/frozen`` holds them."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Everything but the arrays that a run or a policy is rebuilt from."""

    preset: Preset
    """With every size and option as used, the tokenizer's vocabulary among them."""
    base: BaseWeights
    tokenizer: bytes
    """The serialised SentencePiece model."""
    norm_stats: dict[str, Any] | None
    """As in openpi's ``norm_stats.json``; None where the run trains on raw values."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def named_leaves(tree: object) -> dict[str, Any]:
    """Every leaf under its dotted path (``trainable.vision.patch.kernel``)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksum(x: Int[Array, "..."] | Array) -> jax.Array:
    """A uint32 that changes with any bit of ``x`` and with the order of its elements; exact on every device."""
    x = jnp.asarray(x)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).reshape(-1).astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum((bits + jnp.uint32(0x9E3779B9)) * position, dtype=jnp.uint32)


@jax.jit
def checksums(leaves: dict[str, jax.Array]) -> jax.Array:
    """One checksum for each leaf, uint32 [leaves], in the order of the sorted names."""
    return jnp.stack([checksum(leaves[name]) for name in sorted(leaves)] or [jnp.uint32(0)])


def fingerprint(tree: object) -> str:
    """A short hex string for the names and exact values of all leaves."""
    leaves = named_leaves(tree)
    digest = hashlib.sha256(",".join(sorted(leaves)).encode())
    digest.update(np.asarray(checksums(leaves)).astype("<u4").tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns, once per leaf, about caches, topologies and future interfaces: nothing that a user could act on."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The writer of ``directory``: saves in the background and keeps the newest ``keep``."""

    def __init__(self, directory: Path, keep: int, info: RunInfo):
        self._info = info
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options, item_names=("arrays", "info"))

    def save(self, step: int, state: object) -> None:
        """Copies ``state`` to the host and returns; files follow in the background. Waits for the previous save."""
        leaves = named_leaves(state)
        tokenizer = np.frombuffer(self._info.tokenizer or b"\0", np.uint8)
        arrays = {**leaves, CHECKSUMS: checksums(leaves), TOKENIZER: tokenizer}
        args = ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), info=ocp.args.JsonSave(_info_to_json(self._info, step)))
        with _quiet():
            self._manager.save(step, args=args, force=True)

    def close(self) -> None:
        """Waits until everything is on disk."""
        with _quiet():
            self._manager.wait_until_finished()
            self._manager.close()


def _info_to_json(info: RunInfo, step: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": step,
        "preset": dataclasses.asdict(info.preset),
        "base": dataclasses.asdict(info.base),
        "norm_stats": info.norm_stats,
        "versions": dict(info.versions),
    }


def complete_steps(directory: Path) -> list[int]:
    """Steps whose checkpoint was written to the end, oldest first; [] where the folder does not exist."""
    if not directory.is_dir():
        return []
    folders = [entry for entry in directory.iterdir() if entry.name.isdigit()]
    return sorted(int(entry.name) for entry in folders if (entry / "_CHECKPOINT_METADATA").is_file())


def _step_folder(directory: Path, step: int | None) -> Path:
    steps = complete_steps(directory)
    if not steps:
        raise CheckpointError(f"{directory}: expected checkpoints of a training run (folders named by their step), found none")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"{directory}: no complete checkpoint of step {chosen}; there are {steps}")
    return directory / str(chosen)


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    older = [step for step in complete_steps(folder.parent) if str(step) != folder.name]
    remedy = f"delete {folder} to go back to step {older[-1]}" if older else "no older one is left: start the run again"
    return CheckpointError(
        f"{folder}: checkpoint is truncated or damaged ({type(error).__name__}: {str(error).splitlines()[0][:300]}); {remedy}"
    )


def read_info(directory: Path, step: int | None = None) -> RunInfo:
    """What the checkpoint of ``step`` (the latest by default) says about its run."""
    folder = _step_folder(directory, step)
    try:
        with _quiet():
            handler = ocp.Checkpointer(ocp.JsonCheckpointHandler())
            info = handler.restore((folder / "info").resolve())
            arrays = ocp.PyTreeCheckpointer().restore(
                (folder / "arrays").resolve(),
                item={TOKENIZER: 0},
                transforms={},
                restore_args={TOKENIZER: ocp.RestoreArgs(np.ndarray)},
            )
    except Exception as error:
        raise _damaged(folder, error) from error
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: expected checkpoint format {FORMAT}, got {info.get('format')!r}; use the version that wrote it"
        )
    return RunInfo(
        preset=preset_from_dict(info["preset"]),
        base=BaseWeights(**info["base"]),
        tokenizer=np.asarray(arrays[TOKENIZER], np.uint8).tobytes(),
        norm_stats=info["norm_stats"],
        versions=info["versions"],
    )


def _restore(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads ``wanted`` from one orbax item; every absent or misshapen leaf is named in one error."""
    try:
        with _quiet():
            reader = ocp.PyTreeCheckpointer()
            described: Any = reader.metadata(folder.resolve())
            stored = dict(described.item_metadata.tree)
    except Exception as error:
        raise _damaged(folder.parent, error) from error
    _check_leaves(folder, stored, wanted)
    args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in wanted.items()
    }
    try:
        with _quiet():
            return reader.restore(folder.resolve(), item=dict(wanted), restore_args=args, transforms={})
    except Exception as error:
        raise _damaged(folder.parent, error) from error


def _check_leaves(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    problems = [f"missing {name} {leaf.shape}" for name, leaf in wanted.items() if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in wanted and name != TOKENIZER]
    problems += [
        f"{name}: expected {leaf.shape} {leaf.dtype}, got {tuple(stored[name].shape)} {stored[name].dtype}"
        for name, leaf in wanted.items()
        if name in stored and (tuple(stored[name].shape), jnp.dtype(stored[name].dtype)) != (leaf.shape, leaf.dtype)
    ]
    if problems:
        raise CheckpointError(f"{folder}: not a checkpoint of this model and optimizer:\n  " + "\n  ".join(problems))


def _verified(folder: Path, leaves: dict[str, jax.Array], expected: jax.Array) -> dict[str, jax.Array]:
    differs = np.flatnonzero(np.asarray(checksums(leaves)) != np.asarray(expected))
    if differs.size:
        names = [sorted(leaves)[i] for i in differs[:5]]
        raise _damaged(folder.parent, ValueError(f"checksums of {differs.size} leaves differ: {', '.join(names)}"))
    return leaves


def _abstract(leaf: Any, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_tree(folder: Path, like: T, sharding: jax.sharding.Sharding) -> T:
    wanted = {name: _abstract(leaf, sharding) for name, leaf in named_leaves(like).items()}
    count = jax.ShapeDtypeStruct((max(len(wanted), 1),), jnp.uint32, sharding=sharding)
    arrays = _restore(folder, {**wanted, CHECKSUMS: count})
    leaves = _verified(folder, {name: arrays[name] for name in wanted}, arrays[CHECKSUMS])
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named_leaves(like)])


def restore_state(directory: Path, like: T, sharding: jax.sharding.Sharding, step: int | None = None) -> T:
    """The arrays of the checkpoint of ``step`` (the latest by default) in the structure of ``like``.

    ``like`` may be abstract; its leaves' shapes and dtypes must be those stored. Raises ``CheckpointError`` where a file
    is truncated, a checksum differs, or leaves are missing, unexpected or misshapen.
    """
    return _read_tree(_step_folder(directory, step) / "arrays", like, sharding)


def save_frozen(directory: Path, frozen: object) -> None:
    """Writes the frozen leaves once, beside the checkpoints."""
    leaves = named_leaves(frozen)
    with _quiet():
        writer = ocp.PyTreeCheckpointer()
        writer.save((directory / FROZEN / "arrays").resolve(), {**leaves, CHECKSUMS: checksums(leaves)}, force=True)


def load_frozen(directory: Path, like: T, sharding: jax.sharding.Sharding) -> T:
    """Reads what ``save_frozen`` wrote."""
    return _read_tree(directory / FROZEN / "arrays", like, sharding)
