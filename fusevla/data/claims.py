"""What a set says about itself besides what is needed to read it: other counts, announced columns, stored statistics."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusevla.data.lerobot import LeRobotSet

__all__ = ["claim_defects", "claim_warnings"]

MOMENTS: dict[str, Callable[..., np.ndarray]] = {"min": np.min, "max": np.max, "mean": np.mean}


def claim_defects(data: LeRobotSet) -> Iterator[str]:
    """Columns that info.json announces and a parquet file lacks; images may be in a video."""
    for path, videos in data.files().items():
        try:
            names = set(pq.read_schema(path).names)
        except (OSError, pa.ArrowException, ValueError):
            continue  # reported by the reader
        for name in sorted(set(data.info["features"]) - names - videos - set(data.columns.values())):
            yield f"{path.relative_to(data.root)}: lacks column {name!r}, which info.json announces."


def claim_warnings(data: LeRobotSet) -> Iterator[str]:
    """Counts and statistics that nothing here depends on and that are not what the set holds."""
    info, indices = data.info, [episode.index for episode in data.episodes]
    if data.version != "v3.0":
        videos = sum(feature["dtype"] == "video" for feature in info["features"].values()) * len(indices)
        yield from _count(info, "total_videos", videos)
        size = info.get("chunks_size")
        if isinstance(size, int) and size > 0:
            yield from _count(info, "total_chunks", len({index // size for index in indices}))
    splits = info.get("splits")
    for name, span in splits.items() if isinstance(splits, dict) else ():
        start, _, end = str(span).partition(":")
        if not (start.isdigit() and end.isdigit() and int(start[:9]) <= int(end[:9]) <= max(indices) + 1):
            yield f"meta/info.json: split {name!r:.100} expected within 0:{max(indices) + 1}, got {span!r:.100}"
    yield from _statistics(data)


def _count(info: Mapping[str, Any], key: str, found: int) -> Iterator[str]:
    if key in info and info[key] != found:
        yield f"meta/info.json: {key} says {info[key]!r:.100}, the set holds {found}"


def _statistics(data: LeRobotSet) -> Iterator[str]:
    """Stored minimum, maximum and mean against the columns: a value that was changed since shows here."""
    if not data.state.shape[1]:
        return
    per_episode = {}
    for record in _json_records(data.root / "meta/episodes_stats.jsonl"):
        if isinstance(record, dict) and isinstance(record.get("episode_index"), int):
            per_episode[record["episode_index"]] = record.get("stats")
    for i, episode in enumerate(data.episodes):
        for name in _differing(data, data.episode_slice(i), per_episode.get(episode.index)):
            yield f"meta/episodes_stats.jsonl: episode {episode.index}: the statistics of {name} are not those of its frames"
    for whole in _json_records(data.root / "meta/stats.json"):
        for name in _differing(data, slice(None), whole):
            yield f"meta/stats.json: the statistics of {name} are not those of the set's frames"


def _json_records(path: Path) -> list[Any]:
    """The lines of a .jsonl file, or the one document of a .json file; nothing where it cannot be read: nobody needs it."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except (OSError, ValueError, RecursionError):
        return []


def _differing(data: LeRobotSet, rows: slice, stored: Any) -> Iterator[str]:
    """Names of the columns whose stored moments are not those of these rows; what is not stored does not differ."""
    for name, values in (("state", data.state), ("actions", data.actions)):
        entry = stored.get(data.columns[name]) if isinstance(stored, dict) else None
        for key, moment in MOMENTS.items():
            try:
                claimed = np.asarray(entry[key], np.float64).reshape(-1)  # type: ignore[index]
            except (TypeError, KeyError, ValueError):
                continue
            found = moment(values[rows].astype(np.float64), axis=0)
            if claimed.shape == found.shape and not np.allclose(claimed, found, rtol=1e-3, atol=1e-4):
                yield name
                break
