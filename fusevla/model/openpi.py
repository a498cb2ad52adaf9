"""openpi checkpoints: read into ``Pi0Fuse``, and written in the same layout. Needs orbax only.

A ``params`` folder is one orbax PyTree ``{"params": {...}}`` (OCDBT); checkpoints that a training run of openpi saved end
every path in a further ``value`` key. Both are read, and every leaf is accounted for before the first byte of data.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from fusevla.arrays import Array, Key
from fusevla.model.fetch import CheckpointError, find_params
from fusevla.model.fuse import Pi0Fuse, abstract
from fusevla.model.lora import INIT_STD
from fusevla.model.openpi_names import SUFFIXES, Entry, entries, leaves_by_name
from fusevla.presets import ModelConfig

__all__ = ["CheckpointError", "Plan", "StoredLeaf", "load_params", "make_plan", "read_metadata", "save_params"]

GROUP_BYTES = 2**30
"""Leaves are read in groups of at most this size on disk, so that few bytes beside the result are in memory at once."""


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf as the folder has it: its full key path there, shape and dtype."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded leaf."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """What ``load_params`` will do with a folder: the leaves to read, the adapters to make, the leaves to pass over."""

    folder: Path
    config: ModelConfig
    entries: dict[str, Entry]
    stored: dict[str, StoredLeaf]
    fresh: tuple[str, ...]
    """Experts whose LoRA the folder does not hold: initialised (A normal(0.01), B zero)."""
    extra: tuple[str, ...]


def read_metadata(path: str | Path) -> dict[str, StoredLeaf]:
    """Every leaf of a checkpoint by openpi path (without ``params`` and ``value``), from its metadata alone.

    ``path`` is a ``params`` folder, its parent, or a URL such as ``gs://...`` (fetched once). Raises ``CheckpointError``.
    """
    folder = find_params(path)
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
    except Exception as error:
        raise CheckpointError(f"{folder}: the metadata cannot be read ({_first_line(error)}); is the copy complete?") from error
    leaves = [
        StoredLeaf(tuple(str(key.key) for key in keys), tuple(leaf.shape), str(jnp.dtype(leaf.dtype)))
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if hasattr(leaf, "shape")
    ]
    if not leaves or any(leaf.keys[0] != "params" for leaf in leaves):
        tops = ", ".join(sorted({leaf.keys[0] for leaf in leaves})) or "nothing"
        raise CheckpointError(f'{folder}: expected one tree {{"params": ...}} as openpi writes it, found {tops} at the top')
    end = -1 if all(leaf.keys[-1] == "value" for leaf in leaves) else None
    return {"/".join(leaf.keys[1:end]): leaf for leaf in leaves}


def make_plan(path: str | Path, config: ModelConfig, *, ignore_extra: bool = False) -> Plan:
    """Compares a checkpoint's leaves with the model's, by metadata alone.

    An expert of which the folder has no LoRA leaf at all gets fresh adapters; one with some of them must have all. Raises
    one ``CheckpointError`` that lists every missing, unexpected and misshapen leaf; ``ignore_extra`` lets unexpected pass.
    """
    folder = find_params(path)
    stored, wanted = read_metadata(folder), entries(abstract(config))
    adapted = {entry.expert for entry in wanted.values() if entry.expert}
    there = {entry.expert for name, entry in wanted.items() if entry.expert and name in stored}
    fresh = tuple(expert for expert in SUFFIXES if expert in adapted - there)
    wanted = {name: entry for name, entry in wanted.items() if entry.expert not in fresh}
    extra = tuple(sorted(set(stored) - set(wanted)))
    problems = {
        "missing": [f"{name} {list(wanted[name].shape)}" for name in sorted(set(wanted) - set(stored))],
        "unexpected": [] if ignore_extra else [f"{name} {list(stored[name].shape)}" for name in extra],
        "misshapen": list(_misshapen(wanted, stored)),
    }
    if any(problems.values()):
        raise CheckpointError(_report(folder, problems))
    return Plan(folder, config, wanted, stored, fresh, extra)


def load_params(
    path: str | Path,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike | Pi0Fuse = jnp.float32,
    sharding: Sharding | Pi0Fuse | None = None,
    *,
    ignore_extra: bool = False,
    key: Key | None = None,
) -> Pi0Fuse:
    """Reads an openpi checkpoint, leaf by leaf, straight into ``dtype`` and ``sharding``.

    Both may be one value for all leaves or a tree in the shape of the model (``train.freeze.dtype_spec`` makes the dtypes).
    Peak host memory is the result plus about one leaf: the largest are read first, while nothing else is there. ``key``
    draws the adapters of a model with LoRA from a checkpoint without (default ``jax.random.key(0)``).

    Raises ``CheckpointError`` before reading if the leaves are not the model's (see ``make_plan``), or naming every leaf
    whose data cannot be read.
    """
    plan = make_plan(path, config, ignore_extra=ignore_extra)
    place = _Placement(dtype, SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding)
    leaves: dict[str, jax.Array] = {}
    unreadable: list[str] = []
    for group in _groups(plan):
        try:
            leaves.update(_read(plan, group, place))
        except Exception:
            leaves.clear()
            unreadable += _failures(plan, group, place)
    if unreadable:
        raise CheckpointError(_report(plan.folder, {"unreadable": unreadable}))
    if plan.fresh:
        leaves |= _fresh_adapters(plan, place, jax.random.key(0) if key is None else key)
    shapes = abstract(config)
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in leaves_by_name(shapes)])


def save_params(path: str | Path, model: Pi0Fuse, *, trailing_value: bool = False) -> None:
    """Writes ``model`` as an openpi ``params`` folder at ``path``, every leaf in the dtype that it has.

    ``trailing_value`` ends every path in ``value``, as openpi's own training runs do. Raises ``FileExistsError`` rather
    than overwrite.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder or remove this one")
    leaves = leaves_by_name(model)
    tree: dict[str, Any] = {}
    for name, entry in entries(model).items():
        keys = ("params", *name.split("/"), *(("value",) if trailing_value else ()))
        _insert(tree, keys, _joined([leaves[leaf] for leaf in entry.leaves]))
    ocp.PyTreeCheckpointer().save(folder, tree)


@dataclasses.dataclass(frozen=True)
class _Placement:
    """The dtype and sharding of each leaf of the model."""

    dtype: Any
    sharding: Any

    def of(self, leaf: str) -> tuple[Any, Sharding]:
        return self._pick(self.dtype, leaf), self._pick(self.sharding, leaf)

    @staticmethod
    def _pick(value: Any, leaf: str) -> Any:
        return leaves_by_name(value)[leaf] if isinstance(value, Pi0Fuse) else value


def _misshapen(wanted: Mapping[str, Entry], stored: Mapping[str, StoredLeaf]) -> Iterator[str]:
    for name in sorted(set(wanted) & set(stored)):
        expected, found = wanted[name].shape, stored[name]
        if found.shape != expected:
            yield f"{name}: expected {list(expected)}, found {list(found.shape)}"
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            yield f"{name}: expected floating point, found {found.dtype}"


def _report(folder: Path, problems: Mapping[str, list[str]]) -> str:
    remedies = {
        "missing": "the sizes, LoRA or kind of model differ, or the copy is incomplete",
        "unexpected": "choose the sizes and LoRA that the checkpoint has, or pass --ignore-extra (ignore_extra=True)",
        "misshapen": "choose the sizes that the checkpoint has",
        "unreadable": "data are truncated or damaged: copy the checkpoint again",
    }
    lines = [f"{folder}: the checkpoint does not fit"]
    for kind, names in problems.items():
        if names:
            lines += [f"{len(names)} {kind} ({remedies[kind]}):", *(f"    {name}" for name in names)]
    return "\n  ".join(lines)


def _groups(plan: Plan) -> list[list[Entry]]:
    """Leaves in descending size, as many to a group as fit ``GROUP_BYTES``; a larger leaf has a group of its own."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in sorted(plan.entries.values(), key=lambda entry: -plan.stored[entry.path].nbytes):
        room -= plan.stored[entry.path].nbytes
        if room < 0 or not groups:
            groups.append([])
            room = GROUP_BYTES - plan.stored[entry.path].nbytes
        groups[-1].append(entry)
    return groups


def _read(plan: Plan, group: Iterable[Entry], place: _Placement) -> dict[str, jax.Array]:
    """The model leaves of some entries, read concurrently."""
    item: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for entry in group:
        leaf = plan.stored[entry.path]
        _insert(item, leaf.keys, jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)))
        _insert(args, leaf.keys, _restore_args(entry, place))
    request = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    tree = ocp.PyTreeCheckpointer().restore(plan.folder, args=request)
    found: dict[str, jax.Array] = {}
    for entry in group:
        found |= _placed(entry, _look_up(tree, plan.stored[entry.path].keys), place)
    return found


def _restore_args(entry: Entry, place: _Placement) -> ocp.RestoreArgs:
    dtype, sharding = place.of(entry.leaves[0])
    if len(entry.leaves) > 1:  # is split on the host, then placed
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding, global_shape=entry.shape)


def _placed(entry: Entry, value: Any, place: _Placement) -> dict[str, jax.Array]:
    """An entry's value as model leaves; a joined qkv becomes q and kv."""
    if len(entry.leaves) == 1:
        return {entry.leaves[0]: value}
    parts = zip(entry.leaves, (value[:, 0], value[:, 1:]), strict=True)
    return {leaf: jax.device_put(jnp.asarray(part, place.of(leaf)[0]), place.of(leaf)[1]) for leaf, part in parts}


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate([parts[0][:, None], parts[1]], axis=1)


def _failures(plan: Plan, group: Iterable[Entry], place: _Placement) -> list[str]:
    """The entries of a group that cannot be read one at a time, each with the reason."""
    failures = []
    for entry in group:
        try:
            _read(plan, [entry], place)
        except Exception as error:
            failures.append(f"{entry.path}: {_first_line(error)}")
    return failures


def _fresh_adapters(plan: Plan, place: _Placement, key: Key) -> dict[str, jax.Array]:
    """The adapter leaves of the experts in ``plan.fresh``: A normal(0.01), B zero.

    All from one draw: a draw for each leaf would take seconds to compile.
    """
    leaves = {name: leaf for name, leaf in leaves_by_name(abstract(plan.config)).items() if _is_fresh(plan, name)}
    drawn = {name: leaf.size for name, leaf in leaves.items() if name.endswith(".a")}
    numbers = jnp.split(jax.random.normal(key, (sum(drawn.values()),)) * INIT_STD, np.cumsum(list(drawn.values()))[:-1])
    values = dict(zip(drawn, numbers, strict=True))
    found = {}
    for name, leaf in leaves.items():
        dtype, sharding = place.of(name)
        value = values[name].reshape(leaf.shape) if name in values else jnp.zeros(leaf.shape)
        found[name] = jax.device_put(value.astype(dtype), sharding)
    return found


def _is_fresh(plan: Plan, name: str) -> bool:
    return ".adapter." in name and name.split(".")[0] in plan.fresh


def _insert(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _look_up(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}" if str(error).strip() else type(error).__name__
