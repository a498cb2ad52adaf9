"""The numbers of a LeRobot set: state, actions and bookkeeping columns of every episode, read once and checked.

Images are left alone here: a parquet file is read column by column, so 700,000 frames of numbers take seconds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusevla.data.lerobot_meta import Defects, EpisodeRecord, SetMeta

__all__ = ["EpisodeTable", "column_matrix", "read_tables"]

THREADS = 4


@dataclasses.dataclass(frozen=True)
class EpisodeTable:
    """One episode's numbers: state float32 [T, ds], actions float32 [T, da]; its rows start at ``first_row`` of ``path``."""

    path: Path
    first_row: int
    state: np.ndarray
    actions: np.ndarray
    task: str


def read_tables(meta: SetMeta, state: str, actions: str, images: Sequence[str], defects: Defects) -> list[EpisodeTable | None]:
    """Read the columns named ``state`` and ``actions`` of every episode; None (and a defect) where one cannot be used.

    ``images`` are columns that every parquet file must have too (videos are checked for their file).
    """
    files: dict[Path, list[EpisodeRecord]] = {}
    for episode in meta.episodes:
        files.setdefault(episode.path, []).append(episode)
        for column in images:
            if column in episode.videos and not episode.videos[column].path.is_file():
                defects.add(_name(meta, episode.videos[column].path), f"is missing (video of episode {episode.index}, {column}).")
    columns = (state, actions)
    with ThreadPoolExecutor(THREADS) as pool:  # Arrow releases the GIL
        results = list(pool.map(lambda item: _read_file(meta, item[0], item[1], columns, images), files.items()))
    tables: dict[int, EpisodeTable] = {}
    for found, problems in results:
        tables |= found
        defects.extend(problems)
    return [tables.get(episode.index) for episode in meta.episodes]


def _name(meta: SetMeta, path: Path) -> str:
    return str(path.relative_to(meta.root))


def _read_file(
    meta: SetMeta, path: Path, episodes: list[EpisodeRecord], columns: tuple[str, str], images: Sequence[str]
) -> tuple[dict[int, EpisodeTable], Defects]:
    defects, where = Defects(meta.root), _name(meta, path)
    try:
        table = _read_columns(path, columns, [name for name in images if name not in episodes[0].videos])
        values = {name: column_matrix(table[name], meta.features[name]["shape"]) for name in columns}
        counters = {name: _counter(table[name]) for name in table.column_names if name not in columns}
    except FileNotFoundError:
        defects.add(where, f"is missing (episodes {[episode.index for episode in episodes][:5]} should be in it).")
    except KeyError as error:
        defects.add(where, f"lacks column {error.args[0]!r}, which info.json announces.")
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        defects.add(where, f"cannot be read, it may be truncated or of another type ({error}).")
    else:
        return _split(meta, path, episodes, values, counters, columns, defects), defects
    return {}, defects


def _read_columns(path: Path, columns: tuple[str, str], images: Sequence[str]) -> pa.Table:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    for name in (*columns, *images):
        if name not in names:
            raise KeyError(name)
    counters = [name for name in ("episode_index", "frame_index", "timestamp", "task_index") if name in names]
    return file.read([*columns, *counters], use_threads=False)


def column_matrix(column: pa.ChunkedArray, shape: Sequence[int]) -> np.ndarray:
    """A numeric or list column as float32 [T, prod(shape)]. ValueError for nulls, ragged rows or another size."""
    array = column.combine_chunks()
    rows, width = len(array), int(np.prod(shape))
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise ValueError(f"{array.null_count} rows are null")
        if len(array) and len(sizes := pc.unique(pc.list_value_length(array))) != 1:
            raise ValueError(f"rows have different sizes: {sizes.to_pylist()[:5]}")
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"{array.null_count} numbers are null")
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        raise ValueError(f"numbers expected, got {array.type}")
    if len(array) != rows * width:
        raise ValueError(f"{width} numbers per row expected (info.json: shape {list(shape)}), got {len(array) / max(rows, 1):g}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is reported as such
        return array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, width)


def _counter(column: pa.ChunkedArray) -> np.ndarray:
    """A bookkeeping column as [T]; some writers store it as lists of one number."""
    array = column.combine_chunks()
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if array.null_count or len(array) != len(column) or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise ValueError(f"a bookkeeping column needs one number per row, got {array.type} with {array.null_count} nulls")
    return array.to_numpy(zero_copy_only=False)


def _split(
    meta: SetMeta,
    path: Path,
    episodes: list[EpisodeRecord],
    values: Mapping[str, np.ndarray],
    counters: Mapping[str, np.ndarray],
    columns: tuple[str, str],
    defects: Defects,
) -> dict[int, EpisodeTable]:
    """Cut a file into its episodes and check each."""
    rows = len(values[columns[0]])
    of_row = counters.get("episode_index")
    if of_row is None:
        if len(episodes) > 1:
            defects.add(_name(meta, path), "holds several episodes and no episode_index column.")
            return {}
        of_row = np.full(rows, episodes[0].index)
    if strangers := sorted(set(np.unique(of_row).tolist()) - {episode.index for episode in episodes}):
        defects.add(_name(meta, path), f"has rows of episodes {strangers[:5]}, which the meta folder does not place in it.")
    tables = {}
    for episode in episodes:
        found = np.flatnonzero(of_row == episode.index)
        where = f"{_name(meta, path)}, episode {episode.index}"
        if len(found) != episode.length or found[-1] - found[0] + 1 != len(found):
            defects.add(where, f"{episode.length} consecutive rows expected (meta folder), got {len(found)}.")
            continue
        part = slice(int(found[0]), int(found[-1]) + 1)
        _check_finite(where, {name: values[name][part] for name in columns}, defects)
        _check_counters(meta, where, {name: column[part] for name, column in counters.items()}, defects)
        task = _task(meta, where, episode, counters.get("task_index", np.zeros(0, np.int64))[part], defects)
        state, actions = (np.ascontiguousarray(values[name][part]) for name in columns)
        tables[episode.index] = EpisodeTable(path, part.start, state, actions, task)
    return tables


def _check_finite(where: str, values: Mapping[str, np.ndarray], defects: Defects) -> None:
    for name, part in values.items():
        bad = np.argwhere(~np.isfinite(part))
        if len(bad):
            row, dimension = bad[0]
            first = f"the first in frame {row}, dimension {dimension}"
            defects.add(where, f"{name} has {len(bad)} values that are NaN or infinite, {first}.")


def _check_counters(meta: SetMeta, where: str, counters: Mapping[str, np.ndarray], defects: Defects) -> None:
    frames = counters.get("frame_index")
    if frames is not None and not np.array_equal(frames, np.arange(len(frames))):
        first = int(np.flatnonzero(frames != np.arange(len(frames)))[0])
        defects.add(where, f"frame_index must count 0, 1, 2, ...; row {first} has {frames[first]!r}.")
    times = counters.get("timestamp")
    if times is not None and len(times) > 1:
        step = float(np.median(np.diff(times.astype(np.float64))))
        if not abs(step * meta.fps - 1) < 0.1:
            defects.add(where, f"timestamps are {step:g} s apart; info.json says fps {meta.fps:g} ({1 / meta.fps:g} s).")


def _task(meta: SetMeta, where: str, episode: EpisodeRecord, indices: np.ndarray, defects: Defects) -> str:
    """The instruction: the task_index column and the episode's record must agree where both speak."""
    texts = [meta.tasks.get(int(index)) for index in np.unique(indices)]
    if len(texts) > 1:
        defects.add(where, f"one task per episode expected, its frames have {len(texts)}.")
    elif texts and texts[0] is None:
        defects.add(where, f"task_index {int(indices[0])} is not in the table of tasks.")
    elif texts and episode.task not in (None, texts[0]):
        defects.add(where, f"its record says task {episode.task!r}, its frames have {texts[0]!r}.")
    elif not texts and episode.task is None:
        defects.add(where, "has no task: neither a task_index column nor exactly one entry in its record.")
    else:
        return episode.task or texts[0] or ""
    return ""
