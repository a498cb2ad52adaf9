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

__all__ = ["EpisodeTable", "check_steps", "column_matrix", "read_tables"]

THREADS = 4
COUNTERS = ("episode_index", "frame_index", "index", "timestamp", "task_index")
"""Bookkeeping columns; a file may lack any of them."""
MAX_DRIFT = 0.05
"""Share by which the time between frames may differ from 1 / fps."""
Columns = tuple[str | None, str | None]
"""Of the state and of the actions."""


@dataclasses.dataclass(frozen=True)
class EpisodeTable:
    """One episode's numbers: state float32 [T, ds], actions float32 [T, da]; its rows start at ``first_row`` of ``path``."""

    path: Path
    first_row: int
    state: np.ndarray
    actions: np.ndarray
    task: str
    step: float
    """Seconds between frames (median); NaN without timestamps."""


def read_tables(
    meta: SetMeta, state: str | None, actions: str | None, images: Sequence[str], defects: Defects
) -> list[EpisodeTable | None]:
    """Read the columns named ``state`` and ``actions`` of every episode, and note in ``defects`` all that is wrong with them.

    None where an episode's rows cannot be told; a column that cannot be read (or has no name) has no dimensions. ``images``
    are columns that every parquet file must have too (videos are checked for their file).
    """
    files: dict[Path, list[EpisodeRecord]] = {}
    for episode in meta.episodes:
        files.setdefault(episode.path, []).append(episode)
        for column in images:
            if column in episode.videos and not episode.videos[column].path.is_file():
                defects.add(_name(meta, episode.videos[column].path), f"is missing (video of episode {episode.index}, {column}).")
    with ThreadPoolExecutor(THREADS) as pool:  # Arrow releases the GIL
        results = list(pool.map(lambda item: _read_file(meta, item[0], item[1], (state, actions), images), files.items()))
    tables: dict[int, EpisodeTable] = {}
    for found, problems in results:
        tables |= found
        defects.extend(problems)
    return [tables.get(episode.index) for episode in meta.episodes]


def _name(meta: SetMeta, path: Path) -> str:
    return str(path.relative_to(meta.root))


def _read_file(
    meta: SetMeta, path: Path, episodes: list[EpisodeRecord], columns: Columns, images: Sequence[str]
) -> tuple[dict[int, EpisodeTable], Defects]:
    defects, where = Defects(meta.root), _name(meta, path)
    wanted = [name for name in columns if name is not None]
    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        for name in (*wanted, *images):
            if name not in names and name not in episodes[0].videos:
                defects.add(where, f"lacks column {name!r}, which info.json announces.")
        table = file.read([name for name in (*wanted, *COUNTERS) if name in names], use_threads=False)
    except FileNotFoundError:
        defects.add(where, f"is missing (episodes {[episode.index for episode in episodes][:5]} should be in it).")
        return {}, defects
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
        defects.add(where, f"cannot be read, it may be truncated or of another type ({error}).")
        return {}, defects
    values: dict[str | None, np.ndarray] = {}
    counters: dict[str, np.ndarray] = {}
    for name in table.column_names:
        try:
            if name in wanted:
                values[name] = column_matrix(table[name], meta.features[name]["shape"])
            else:
                counters[name] = _counter(table[name], name)
        except (pa.ArrowException, ValueError, TypeError) as error:
            defects.add(where, f"column {name!r} cannot be read: {error}.")
    return _split(meta, path, table.num_rows, episodes, values, counters, columns, defects), defects


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


def _counter(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """A bookkeeping column as [T]; some writers store it as lists of one number."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    good = pa.types.is_integer(array.type) or (pa.types.is_floating(array.type) and name == "timestamp")
    if array.null_count or len(array) != len(column) or not good:
        kind = "number" if name == "timestamp" else "integer"
        raise ValueError(f"one {kind} per row expected, got {len(array)} of {array.type} ({array.null_count} null)")
    return array.to_numpy(zero_copy_only=False)


def _split(
    meta: SetMeta,
    path: Path,
    rows: int,
    episodes: list[EpisodeRecord],
    values: Mapping[str | None, np.ndarray],
    counters: Mapping[str, np.ndarray],
    columns: Columns,
    defects: Defects,
) -> dict[int, EpisodeTable]:
    """Cut a file into its episodes and check each."""
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
        together = len(found) > 0 and found[-1] - found[0] + 1 == len(found)
        if len(found) != episode.length or not together:
            defects.add(where, f"{episode.length} consecutive rows expected (meta folder), got {len(found)}.")
        if not together:
            continue
        part = slice(int(found[0]), int(found[-1]) + 1)
        _check_finite(where, {name: table[part] for name, table in values.items()}, defects)
        _check_counters(meta, where, {name: column[part] for name, column in counters.items()}, defects)
        task = _task(meta, where, episode, counters.get("task_index", np.zeros(0, np.int64))[part], defects)
        state, actions = (
            np.ascontiguousarray(values[name][part]) if name in values else np.zeros((len(found), 0), np.float32)
            for name in columns
        )
        step = _step(where, counters.get("timestamp", np.zeros(0))[part], defects)
        tables[episode.index] = EpisodeTable(path, part.start, state, actions, task, step)
    return tables


def _check_finite(where: str, values: Mapping[str | None, np.ndarray], defects: Defects) -> None:
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
    index = counters.get("index")
    if index is not None and (np.diff(index) != 1).any():
        defects.add(where, f"index must count up by 1; it does not after row {int(np.flatnonzero(np.diff(index) != 1)[0])}.")


def _step(where: str, times: np.ndarray, defects: Defects) -> float:
    """The median of the timestamps' differences, from which none may differ by half."""
    if len(times) < 2:
        return float("nan")
    steps = np.diff(times.astype(np.float64))
    median = float(np.median(steps))
    irregular = np.flatnonzero(~(np.abs(steps - median) < 0.5 * abs(median)))
    if len(irregular):
        row = int(irregular[0])
        defects.add(where, f"timestamp of row {row + 1} expected {median:.4g} s after the one before, got {steps[row]:.4g} s.")
    return median


def check_steps(meta: SetMeta, tables: Sequence[EpisodeTable | None], defects: Defects) -> None:
    """fps of info.json against the timestamps: one line for all episodes that say the same."""
    odd: dict[str, list[int]] = {}
    for episode, table in zip(meta.episodes, tables, strict=True):
        if table is not None and np.isfinite(table.step) and np.isfinite(meta.fps) and abs(table.step * meta.fps - 1) > MAX_DRIFT:
            odd.setdefault(f"{table.step:.4g}", []).append(episode.index)
    for step, indices in odd.items():
        some = ", ".join(map(str, indices[:5])) + (f", ... ({len(indices)} in all)" if len(indices) > 5 else "")
        says = f"info.json says fps {meta.fps:g} ({1 / meta.fps:.4g} s)"
        defects.add("meta/info.json", f"timestamps are {step} s apart; {says}: episodes {some}.")


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
