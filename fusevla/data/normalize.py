"""Normalisation statistics of state and actions, in openpi's file format, and the two normalisations made from them.

pi0.5 uses quantiles: ``(x - q01) / (q99 - q01 + 1e-6) * 2 - 1``, so that 98% of the values lie in [-1, 1]; ``zscore`` is
``(x - mean) / (std + 1e-6)``. Format and formulas: openpi ``src/openpi/{shared/normalize,transforms}.py``@15a9616a.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusevla.arrays import Float
from fusevla.data.lerobot import LeRobotSet
from fusevla.files import write_whole

__all__ = [
    "Method",
    "NormStats",
    "array_stats",
    "compute_norm_stats",
    "degenerate",
    "load_norm_stats",
    "normalize",
    "save_norm_stats",
    "stats_from_json",
    "stats_to_json",
    "unnormalize",
]

Method = Literal["quantile", "zscore"]
EPSILON = 1e-6
FIELDS = ("mean", "std", "q01", "q99")


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics per dimension, float64 [d]. ``q01`` and ``q99`` are None in files that only know moments."""

    mean: Float[np.ndarray, " a"]
    std: Float[np.ndarray, " a"]
    q01: Float[np.ndarray, " a"] | None = None
    q99: Float[np.ndarray, " a"] | None = None


def array_stats(values: Float[np.ndarray, "n a"]) -> NormStats:
    """Exact moments (population standard deviation) and linearly interpolated quantiles over the rows of ``values``."""
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"Statistics need finite values [rows > 0, dimensions]; got {values.dtype} {list(values.shape)}.")
    values = values.astype(np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    # a constant's mean is rounded: give it back exactly, with no spread
    constant = values.min(axis=0) == values.max(axis=0)
    mean = np.where(constant, values[0], values.mean(axis=0))
    return NormStats(mean, np.where(constant, 0.0, values.std(axis=0)), q01, q99)


def compute_norm_stats(data: LeRobotSet, episodes: Sequence[int] | None = None) -> dict[str, NormStats]:
    """Statistics of ``state`` and ``actions`` over every frame, or over the ``episodes`` at these positions. Decodes no image."""
    return pooled_norm_stats([(data, range(len(data.episodes)) if episodes is None else episodes)])


def pooled_norm_stats(parts: Sequence[tuple[LeRobotSet, Sequence[int]]]) -> dict[str, NormStats]:
    """Statistics over the frames of several sets together: of each, the episodes at these positions.

    Raises ``ValueError`` where the sets do not have the same dimensions.
    """
    tables: dict[str, list[np.ndarray]] = {"state": [], "actions": []}
    for data, episodes in parts:
        spans = [data.episode_slice(i) for i in episodes]
        rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        tables["state"].append(data.state[rows])
        tables["actions"].append(data.actions[rows])
    for name, values in tables.items():
        if len({table.shape[-1] for table in values}) > 1:
            got = ", ".join(f"{table.shape[-1]} in {data.root}" for table, (data, _) in zip(values, parts, strict=True))
            raise ValueError(f"{name}: expected the same number of dimensions in every set, got {got}; train them apart")
    return {name: array_stats(np.concatenate(values)) for name, values in tables.items()}


def degenerate(stats: NormStats, method: Method = "quantile") -> np.ndarray:
    """bool [d]: dimensions (nearly) constant in the data, whose spread says nothing about scale."""
    low, high = _bounds(stats, method)
    return (high - low) <= 10 * EPSILON * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))


def normalize(
    x: Float[np.ndarray, "*batch a"], stats: NormStats, method: Method = "quantile", *, clip_degenerate: bool = True
) -> Float[np.ndarray, "*batch a"]:
    """Normalise the last axis; ``x`` may have fewer dimensions than ``stats``. Keeps the dtype of ``x``.

    A dimension without spread is clipped to [-1, 1]: the bare formula divides by 1e-6 there and turns the first value that
    differs into millions. ``clip_degenerate=False`` is the bare formula, as in openpi.
    """
    dims = x.shape[-1]
    if dims > len(stats.mean):
        raise ValueError(f"Statistics of {len(stats.mean)} dimensions cannot normalise an array {list(x.shape)}.")
    low, high = (bound[:dims] for bound in _bounds(stats, method))
    if method == "quantile":
        y = (x - low) / (high - low + EPSILON) * 2 - 1
    else:
        y = (x - stats.mean[:dims]) / (stats.std[:dims] + EPSILON)
    if clip_degenerate:
        y = np.where(degenerate(stats, method)[:dims], np.clip(y, -1, 1), y)
    return y.astype(x.dtype)


def unnormalize(x: Float[np.ndarray, "*batch a"], stats: NormStats, method: Method = "quantile") -> Float[np.ndarray, "*batch a"]:
    """Undo ``normalize`` on the last axis; dimensions beyond those of ``stats`` (padding) pass unchanged. Keeps the dtype."""
    dims = min(x.shape[-1], len(stats.mean))
    low, high = (bound[:dims] for bound in _bounds(stats, method))
    if method == "quantile":
        y = (x[..., :dims] + 1) / 2 * (high - low + EPSILON) + low
    else:
        y = x[..., :dims] * (stats.std[:dims] + EPSILON) + stats.mean[:dims]
    return np.concatenate([y, x[..., dims:]], axis=-1).astype(x.dtype)


def _bounds(stats: NormStats, method: Method) -> tuple[np.ndarray, np.ndarray]:
    if method == "zscore":
        return stats.mean - stats.std, stats.mean + stats.std
    if stats.q01 is None or stats.q99 is None:
        raise ValueError("These statistics have no quantiles (q01, q99); compute them again, or use method='zscore'.")
    return stats.q01, stats.q99


def stats_to_json(stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """openpi's layout: {"norm_stats": {key: {mean, std, q01, q99}}}, lists of numbers or null."""
    lists = {
        key: {field: None if (value := getattr(entry, field)) is None else value.tolist() for field in FIELDS}
        for key, entry in stats.items()
    }
    return {"norm_stats": lists}


def stats_from_json(document: Any, where: str = "norm_stats") -> dict[str, NormStats]:
    """Read what ``stats_to_json`` or openpi wrote. ValueError naming ``where`` and the entry that is wrong."""
    entries = document.get("norm_stats") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{where}: expected {{"norm_stats": {{"state": ..., "actions": ...}}}}.')
    return {key: _entry(entry, f"{where}: {key}") for key, entry in entries.items()}


def _entry(entry: Any, where: str) -> NormStats:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with {', '.join(FIELDS)}; got {type(entry).__name__}.")
    arrays: dict[str, np.ndarray] = {}
    for field in FIELDS:
        if entry.get(field) is None and field in ("q01", "q99"):
            continue
        try:
            arrays[field] = np.asarray(entry.get(field), np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.{field} must be a list of numbers; got {entry.get(field)!r:.80}.") from error
        if arrays[field].ndim != 1 or not np.isfinite(arrays[field]).all():
            raise ValueError(f"{where}.{field} must be a list of finite numbers; got {entry.get(field)!r:.80}.")
    sizes = {field: len(array) for field, array in arrays.items()}
    if len(set(sizes.values())) != 1 or ("q01" in arrays) != ("q99" in arrays):
        raise ValueError(f"{where}: mean, std and both or neither of q01, q99 must have one length; got {sizes}.")
    if (arrays["std"] < 0).any() or ("q01" in arrays and (arrays["q99"] < arrays["q01"]).any()):
        raise ValueError(f"{where}: std must not be negative and q99 not below q01.")
    return NormStats(**arrays)


def load_norm_stats(path: str | Path) -> dict[str, NormStats]:
    """Read an openpi ``norm_stats.json`` (or the folder that holds it). FileNotFoundError, ValueError with the path."""
    path = Path(path).expanduser()
    path = path / "norm_stats.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No norm_stats.json at {path}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    return stats_from_json(document, str(path))


def save_norm_stats(path: str | Path, stats: Mapping[str, NormStats]) -> Path:
    """Write ``norm_stats.json`` (into ``path`` if that is a folder) and return the file; readable by openpi."""
    path = Path(path).expanduser()
    path = path / "norm_stats.json" if path.is_dir() else path
    write_whole(path, json.dumps(stats_to_json(stats), indent=2).encode())
    return path
