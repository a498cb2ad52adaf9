"""Leaves episodes out of a LeRobot folder (v2.x or v3.0), in place; only for a folder that is ours to change."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusevla.data.lerobot_meta import Defects, read_meta
from fusevla.files import write_whole

__all__ = ["drop_episodes"]


def drop_episodes(root: Path, dropped: Collection[int]) -> None:
    """Removes these episodes from a set without defects; the numbers of the others, and the tasks, stay as they are.

    Files are replaced, never written into, so hard links to another folder leave that one alone.
    """
    defects = Defects(root)
    meta = read_meta(root, defects)
    defects.stop_if_any()
    assert meta is not None
    gone = [episode for episode in meta.episodes if episode.index in dropped]
    kept = [episode for episode in meta.episodes if episode.index not in dropped]
    for path in {episode.path for episode in gone}:
        _filter_table(path, dropped, whole=path not in {episode.path for episode in kept})
    used = {span.path for episode in kept for span in episode.videos.values()}
    for path in {span.path for episode in gone for span in episode.videos.values()} - used:
        path.unlink(missing_ok=True)
    for name in ("episodes.jsonl", "episodes_stats.jsonl"):
        _filter_lines(root / "meta" / name, dropped)
    for path in (root / "meta/episodes").glob("*/*.parquet"):
        _filter_table(path, dropped, whole=False)
    info: dict[str, Any] = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    info |= {"total_episodes": len(kept), "total_frames": sum(episode.length for episode in kept)}
    if info.get("total_videos"):
        info["total_videos"] = len(kept) * len(kept[0].videos)
    write_whole(root / "meta/info.json", json.dumps(info, indent=4).encode())


def _filter_lines(path: Path, dropped: Collection[int]) -> None:
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.strip() and json.loads(line).get("episode_index") not in dropped]
        write_whole(path, "".join(kept).encode())


def _filter_table(path: Path, dropped: Collection[int], whole: bool) -> None:
    """Without the rows of these episodes; ``whole``: all of them are."""
    if whole:
        return path.unlink()
    table = pq.read_table(path)
    numbers = table["episode_index"].combine_chunks()
    keep = ~np.isin(np.asarray(numbers.to_pylist()).reshape(-1), list(dropped))
    if keep.all():
        return None
    sink = pa.BufferOutputStream()
    pq.write_table(table.filter(pa.array(keep)), sink)
    return write_whole(path, sink.getvalue().to_pybytes()) if keep.any() else path.unlink()
