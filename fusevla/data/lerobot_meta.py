"""What the ``meta`` folder of a LeRobot set says (v2.0, v2.1, v3.0), checked and brought to one form.

v2.x: ``meta/{info.json, tasks.jsonl, episodes.jsonl}``, one parquet file (and one video per camera) per episode.
v3.0: ``meta/{info.json, tasks.parquet, episodes/chunk-*/file-*.parquet}``, many episodes per parquet file and video.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Defects", "EpisodeRecord", "LeRobotError", "SetMeta", "VideoSpan", "read_meta"]

VERSIONS = ("v2.0", "v2.1", "v3.0")


class LeRobotError(ValueError):
    """A LeRobot folder that cannot be used; ``defects`` lists everything that was found, one sentence each."""

    def __init__(self, root: str | Path, defects: list[str]) -> None:
        self.root, self.defects = str(root), list(defects)
        shown = "\n".join(f"  - {defect}" for defect in defects[:50])
        more = f"\n  ... and {len(defects) - 50} more" if len(defects) > 50 else ""
        count = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
        super().__init__(f"The LeRobot set {root} cannot be used; {count} found:\n{shown}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.defects)  # so that it survives the way back from a worker process


class Defects(list[str]):
    """Collects defects, so that all are reported at once."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def add(self, where: str, problem: str) -> None:
        """Note ``problem`` (expected and got) at ``where`` (a file, an episode)."""
        self.append(f"{where}: {problem}")

    def stop_if_any(self) -> None:
        """Raise LeRobotError when something has been noted."""
        if self:
            raise LeRobotError(self.root, self)


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where the frames of one episode and camera lie: seconds from ``start`` in the video file ``path``."""

    path: Path
    start: float


@dataclasses.dataclass(frozen=True)
class EpisodeRecord:
    """One episode according to the meta folder; ``path`` is its parquet file, ``task`` None where the record names none."""

    index: int
    length: int
    task: str | None
    path: Path
    videos: dict[str, VideoSpan]


@dataclasses.dataclass(frozen=True)
class SetMeta:
    """The checked meta folder. ``features`` maps a column to its {dtype, shape} of info.json; ``info`` is all of that file."""

    root: Path
    version: str
    fps: float
    """NaN where info.json gives none that can be used (a defect)."""
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episodes: tuple[EpisodeRecord, ...]
    info: dict[str, Any]


def read_meta(root: Path, defects: Defects) -> SetMeta | None:
    """Read and check ``root/meta``. What is wrong is noted in ``defects``; None where too little is left to look further."""
    if not root.is_dir():
        defects.append(f"{root} is not a folder. Give the folder that contains meta/info.json.")
        return None
    if not (root / "meta/info.json").is_file():
        defects.add("meta/info.json", "is missing. Give the folder of a LeRobot set (it contains meta/ and data/).")
        return None
    info = _read_info(root, defects)
    if info is None:
        return None
    tasks = _read_tasks(root, info["codebase_version"], defects)
    unread = len(defects)
    episodes = _read_episodes(root, info, defects)
    _check_totals(info, tasks, episodes, complete=len(defects) == unread, defects=defects)
    return SetMeta(root, info["codebase_version"], info["fps"], info["features"], tasks, tuple(episodes), info)


def _read_info(root: Path, defects: Defects) -> dict[str, Any] | None:
    """info.json with the features and the fps that can be used; None where nothing else could be read with it."""
    where = "meta/info.json"
    try:
        info = json.loads((root / where).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        defects.add(where, f"is not readable JSON ({error}).")
        return None
    if not isinstance(info, dict):
        defects.add(where, f"must be a JSON object; got {type(info).__name__}.")
        return None
    version, template = info.get("codebase_version"), info.get("data_path")
    fps: Any = info.get("fps")
    if version not in VERSIONS:
        defects.add(where, f"codebase_version must be one of {', '.join(VERSIONS)}; got {version!r:.200}.")
    good_fps = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < 1e5
    if not good_fps:
        defects.add(where, f"fps must be a positive number; got {fps!r:.200}.")
    if not isinstance(template, str):
        defects.add(where, f"data_path must be a path template; got {template!r:.200}.")
    features = _good_features(info.get("features"), defects)
    if version not in VERSIONS or not isinstance(template, str) or not features:
        return None
    return info | {"features": features, "fps": float(fps) if good_fps else float("nan")}


def _good_features(features: Any, defects: Defects) -> dict[str, dict[str, Any]]:
    where = "meta/info.json"
    if not isinstance(features, dict) or not features:
        defects.add(where, f"features must be an object of columns; got {type(features).__name__}.")
        return {}
    good = {}
    for name, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if not isinstance(shape, list) or not all(_is_index(size) and 0 < size < 1 << 20 for size in shape):
            defects.add(where, f"feature {name!r} needs a dtype and a shape of positive integers; got {feature!r:.200}.")
        elif not isinstance(feature.get("dtype"), str):
            defects.add(where, f"feature {name!r} needs a dtype; got {feature.get('dtype')!r:.200}.")
        else:
            good[name] = feature
    return good


def _check_totals(
    info: Mapping[str, Any], tasks: Mapping[int, str], episodes: list[EpisodeRecord], complete: bool, defects: Defects
) -> None:
    """info.json against the episode records: the counts it claims must be the counts there are."""
    frames = sum(episode.length for episode in episodes)
    found = {"total_tasks": len(tasks)} | ({"total_episodes": len(episodes), "total_frames": frames} if complete else {})
    for key, count in found.items():
        if key in info and (isinstance(info[key], bool) or info[key] != count):
            defects.add("meta/info.json", f"{key} says {info[key]!r:.200}, the records beside it hold {count}.")
    if not episodes:
        defects.add("meta", "lists no episode.")


def _json_lines(root: Path, name: str, defects: Defects) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each line."""
    try:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return defects.add(name, f"cannot be read ({error}).")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            defects.add(f"{name} line {number}", f"is not JSON ({error}).")
            continue
        if isinstance(record, dict):
            yield f"{name} line {number}", record
        else:
            defects.add(f"{name} line {number}", f"must be an object; got {type(record).__name__}.")


def _parquet_rows(root: Path, path: Path, columns: list[str] | None, defects: Defects) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) for each row of a small parquet file; ``columns`` that it lacks are left out."""
    name = str(path.relative_to(root))
    try:
        file = pq.ParquetFile(path)
        table = file.read(columns if columns is None else [c for c in columns if c in file.schema_arrow.names])
        rows = table.to_pylist()
    except (OSError, pa.ArrowException, ValueError) as error:
        return defects.add(name, f"cannot be read, it may be truncated ({error}).")
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows))


def _read_tasks(root: Path, version: str, defects: Defects) -> dict[int, str]:
    tasks: dict[int, str] = {}
    if version == "v3.0":
        rows = _parquet_rows(root, root / "meta/tasks.parquet", None, defects)
    else:
        rows = _json_lines(root, "meta/tasks.jsonl", defects)
    for where, row in rows:
        index: Any = row.get("task_index")
        # v3.0 keeps the text in the frame's index: "task" or, unnamed, "__index_level_0__"
        task: Any = row.get("task", row.get("__index_level_0__"))
        if not _is_index(index) or not _is_text(task):
            defects.add(where, f"needs an integer task_index and a task text; got {row!r:.200}.")
        elif index in tasks:
            defects.add(where, f"task_index {index} appears twice.")
        else:
            tasks[index] = task
    return tasks


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    """Not blank, and free of the lone surrogates that JSON can spell and UTF-8 cannot."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors="replace").decode()


def _read_episodes(root: Path, info: Mapping[str, Any], defects: Defects) -> list[EpisodeRecord]:
    version3 = info["codebase_version"] == "v3.0"
    episodes: dict[int, EpisodeRecord] = {}
    for where, row in _episode_rows_v3(root, info, defects) if version3 else _json_lines(root, "meta/episodes.jsonl", defects):
        index: Any = row.get("episode_index")
        length: Any = row.get("length")
        tasks = row.get("tasks", [])
        if not _is_index(index) or not _is_index(length) or length == 0:
            defects.add(where, f"needs an episode_index and a positive length; got {index!r:.100} and {length!r:.100}.")
        elif not isinstance(tasks, list) or not all(_is_text(task) for task in tasks):
            defects.add(where, f"tasks must be a list of texts; got {tasks!r:.200}.")
        elif index in episodes:
            defects.add(where, f"episode_index {index} appears twice.")
        else:
            try:
                path, videos = (_paths_v3 if version3 else _paths_v2)(root, info, index, row)
            except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
                defects.add(where, f"no file follows from the path templates of info.json for episode {index} ({error!r}).")
                continue
            for problem in _span_problems(row, length, info["fps"], videos):
                defects.add(where, f"episode {index}: {problem}")
            episodes[index] = EpisodeRecord(index, length, tasks[0] if len(tasks) == 1 else None, path, videos)
    return [episodes[index] for index in sorted(episodes)]


def _episode_rows_v3(root: Path, info: Mapping[str, Any], defects: Defects) -> Iterator[tuple[str, dict[str, Any]]]:
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += ["dataset_from_index", "dataset_to_index"]
    for video in _video_keys(info):
        columns += [f"videos/{video}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        defects.add("meta/episodes", "has no parquet file; a v3.0 set lists its episodes there.")
    for path in files:
        yield from _parquet_rows(root, path, columns, defects)


def _video_keys(info: Mapping[str, Any]) -> list[str]:
    return [name for name, feature in info["features"].items() if feature["dtype"] == "video"]


def _paths_v2(root: Path, info: Mapping[str, Any], index: int, row: Mapping[str, Any]) -> tuple[Path, dict[str, VideoSpan]]:
    fields = {"episode_chunk": index // int(info.get("chunks_size", 1000)), "episode_index": index}
    videos = {key: VideoSpan(_inside(root, info["video_path"].format(video_key=key, **fields)), 0.0) for key in _video_keys(info)}
    return _inside(root, info["data_path"].format(**fields)), videos


def _paths_v3(root: Path, info: Mapping[str, Any], index: int, row: Mapping[str, Any]) -> tuple[Path, dict[str, VideoSpan]]:
    videos = {}
    for key in _video_keys(info):
        fields = {name: int(row[f"videos/{key}/{name}"]) for name in ("chunk_index", "file_index")}
        path = _inside(root, info["video_path"].format(video_key=key, **fields))
        videos[key] = VideoSpan(path, float(row[f"videos/{key}/from_timestamp"]))
    fields = {name: int(row[f"data/{name}"]) for name in ("chunk_index", "file_index")}
    return _inside(root, info["data_path"].format(**fields)), videos


def _span_problems(row: Mapping[str, Any], length: int, fps: float, videos: Mapping[str, VideoSpan]) -> Iterator[str]:
    """v3.0 says an episode's extent several times; a start that is wrong would shift every frame of a video."""
    first, last = row.get("dataset_from_index"), row.get("dataset_to_index")
    if first is not None and last is not None and last - first != length:
        yield f"length {length} expected to be dataset_to_index - dataset_from_index, got {last} - {first}."
    for key, span in videos.items():
        end = row.get(f"videos/{key}/to_timestamp")
        if not span.start >= 0 or span.start == float("inf"):
            yield f"from_timestamp of {key} must not be negative; got {span.start}."
        elif end is not None and abs((end - span.start) * fps - length) > 0.5:
            took = f"{span.start:g} s to {end:g} s at fps {fps:g}"
            yield f"length {length} expected to be its part of the video of {key}, got {took}."


def _inside(root: Path, relative: str) -> Path:
    if len(relative) > 1000 or "\0" in relative:
        raise ValueError(f"not a path: {relative!r:.100}")
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise ValueError(f"{relative!r} leaves the set's folder")
    return root / relative
