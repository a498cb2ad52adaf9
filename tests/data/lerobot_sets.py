"""Small LeRobot sets for the tests: written by our own writer as v2.1, then rearranged into the other layouts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusevla.data.lerobot import EpisodeFrames, write_lerobot_v21

LENGTHS = (5, 7, 6)


def episodes(lengths: Sequence[int] = LENGTHS, size: int = 16, seed: int = 0) -> list[EpisodeFrames]:
    rng = np.random.default_rng(seed)

    def images(length: int) -> np.ndarray:
        return rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)

    return [
        EpisodeFrames(
            task=f"task number {i % 2}",
            images={"image": images(length), "wrist_image": images(length)},
            state=rng.normal(size=(length, 8)).astype(np.float32),
            actions=rng.normal(size=(length, 7)).astype(np.float32),
        )
        for i, length in enumerate(lengths)
    ]


def write(root: Path, lengths: Sequence[int] = LENGTHS, **kwargs: Any) -> Path:
    return write_lerobot_v21(root, episodes(lengths), **kwargs)


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, **columns: Any) -> None:
    """Replace columns of a parquet file; None drops one."""
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.remove_column(index) if values is None else table.set_column(index, name, pa.array(values))
    pq.write_table(table, path)


def episode_file(root: Path, index: int) -> Path:
    return root / f"data/chunk-000/episode_{index:06d}.parquet"


def as_v20(source: Path, root: Path) -> Path:
    """v2.0 differs in its statistics: one file for the whole set."""
    shutil.copytree(source, root)
    (root / "meta/episodes_stats.jsonl").unlink()
    (root / "meta/stats.json").write_text("{}")
    edit_info(root, codebase_version="v2.0")
    return root


def as_v30(source: Path, root: Path, row_group_size: int = 4) -> Path:
    """v3.0: all episodes in one parquet file (several row groups), metadata in parquet too."""
    info = json.loads((source / "meta/info.json").read_text())
    records = [json.loads(line) for line in (source / "meta/episodes.jsonl").read_text().splitlines()]
    tasks = [json.loads(line) for line in (source / "meta/tasks.jsonl").read_text().splitlines()]
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    tables = [pq.read_table(episode_file(source, record["episode_index"])) for record in records]
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet", row_group_size=row_group_size)
    ends = np.cumsum([record["length"] for record in records])
    rows = [
        record
        | {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": end - record["length"], "dataset_to_index": end}
        for record, end in zip(records, ends.tolist(), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(
        pa.table({"task_index": [t["task_index"] for t in tasks], "__index_level_0__": [t["task"] for t in tasks]}),
        root / "meta/tasks.parquet",
    )
    info |= {"codebase_version": "v3.0", "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root
