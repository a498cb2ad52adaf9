"""Writing LeRobot v2.1 folders: one parquet file per episode with encoded images in it, and the JSON files beside them.

The layout is LeRobot's own (``lerobot`` v2.1, ``LeRobotDataset.save_episode``): every file that its reader, its v2.1 to
v3.0 converter or the Hugging Face ``datasets`` package looks at is there, with the Arrow schema that they write.
"""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

__all__ = ["EpisodeFrames", "encode_image", "write_lerobot_v21"]

CHUNK_SIZE = 1000
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
STATS_IMAGES = 16
"""Images per episode and camera that enter the image statistics (LeRobot samples them too)."""
BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}


@dataclasses.dataclass(frozen=True)
class EpisodeFrames:
    """One episode to be written.

    ``images`` maps a column name (``image``, ``wrist_image``) to T frames, uint8 [T, H, W, 3] or already encoded PNG/JPEG
    bytes; ``state`` is float32 [T, state_dim], ``actions`` float32 [T, action_dim], one row per frame.
    """

    task: str
    images: Mapping[str, np.ndarray | Sequence[bytes]]
    state: np.ndarray
    actions: np.ndarray


def encode_image(image: np.ndarray, image_format: Literal["png", "jpeg"] = "png", quality: int = 95) -> bytes:
    """uint8 [H, W, 3] -> PNG or JPEG bytes. Raises ValueError on any other dtype or shape."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"An image to encode must be uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=image_format, **({"quality": quality} if image_format == "jpeg" else {}))
    return buffer.getvalue()


def write_lerobot_v21(
    root: str | Path,
    episodes: Iterable[EpisodeFrames],
    *,
    fps: int = 10,
    robot_type: str = "panda",
    image_format: Literal["png", "jpeg"] = "png",
) -> Path:
    """Write ``episodes`` as a LeRobot v2.1 folder at ``root`` and return it.

    Episodes are numbered in the order given and streamed: only one is in memory. The folder is built beside ``root`` and
    renamed when it is complete, so an interrupted write leaves no half set behind.

    Raises:
        FileExistsError: ``root`` exists already and is not an empty folder.
        ValueError: no episode, or an episode whose arrays disagree (with each other or with the first episode).
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists already; a LeRobot set is only written to a new folder. Delete it or choose another."
        )
    partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
    try:
        _write_all(partial, episodes, fps, robot_type, image_format)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _write_all(
    root: Path, episodes: Iterable[EpisodeFrames], fps: int, robot_type: str, image_format: Literal["png", "jpeg"]
) -> None:
    tasks: dict[str, int] = {}
    records: list[dict[str, Any]] = []
    stats: list[dict[str, Any]] = []
    features: dict[str, Any] = {}
    start = 0
    for index, episode in enumerate(episodes):
        length = _check_episode(episode, index)
        encoded = {name: _encode_frames(frames, image_format) for name, frames in episode.images.items()}
        own = _features(episode, encoded)
        if features and own != features:
            raise ValueError(f"Episode {index} has columns and shapes {own}; the first episode has {features}. They must agree.")
        features = own
        task_index = tasks.setdefault(episode.task, len(tasks))
        columns = _columns(episode, index, start, task_index, fps)
        path = root / DATA_PATH.format(episode_chunk=index // CHUNK_SIZE, episode_index=index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(encoded, columns, image_format), path, use_dictionary=cast(Any, list(columns)))
        records.append({"episode_index": index, "tasks": [episode.task], "length": length})
        stats.append({"episode_index": index, "stats": _episode_stats(encoded, columns)})
        start += length
    if not records:
        raise ValueError(f"Nothing to write to {root}: a LeRobot set needs at least one episode.")
    (root / "meta").mkdir()
    info = _info(features, records, len(tasks), fps, robot_type)
    (root / "meta/info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for task, i in tasks.items()])
    _write_lines(root / "meta/episodes.jsonl", records)
    _write_lines(root / "meta/episodes_stats.jsonl", stats)


def _check_episode(episode: EpisodeFrames, index: int) -> int:
    """The episode's length; ValueError naming whatever disagrees."""
    length = len(episode.actions)
    lengths = {"state": len(episode.state), "actions": length, **{name: len(frames) for name, frames in episode.images.items()}}
    if length == 0 or len(set(lengths.values())) != 1:
        raise ValueError(f"Episode {index} needs the same number of frames (at least one) everywhere; got {lengths}.")
    for name, values in (("state", episode.state), ("actions", episode.actions)):
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError(f"{name} of episode {index} must be finite, [frames, dimensions]; got shape {list(values.shape)}.")
    if not episode.task.strip():
        raise ValueError(f"Episode {index} has an empty task; LeRobot needs an instruction.")
    return length


def _encode_frames(frames: np.ndarray | Sequence[bytes], image_format: Literal["png", "jpeg"]) -> list[bytes]:
    return [frame if isinstance(frame, bytes) else encode_image(np.asarray(frame), image_format) for frame in frames]


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _features(episode: EpisodeFrames, encoded: Mapping[str, list[bytes]]) -> dict[str, Any]:
    """The ``features`` of info.json, in the order of the parquet columns."""
    features: dict[str, Any] = {}
    for name, frames in encoded.items():
        features[name] = {"dtype": "image", "shape": list(_decode(frames[0]).shape), "names": ["height", "width", "channel"]}
    for name, values in (("state", episode.state), ("actions", episode.actions)):
        features[name] = {"dtype": "float32", "shape": [values.shape[1]], "names": [name]}
    return features | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in BOOKKEEPING.items()}


def _columns(episode: EpisodeFrames, index: int, start: int, task_index: int, fps: int) -> dict[str, np.ndarray]:
    """Every column that is not an image, [T] or [T, dimensions]."""
    length = len(episode.actions)
    frame = np.arange(length)
    values: dict[str, np.ndarray] = {
        "state": np.asarray(episode.state, np.float32),
        "actions": np.asarray(episode.actions, np.float32),
        "timestamp": frame / fps,
        "frame_index": frame,
        "episode_index": np.full(length, index),
        "index": start + frame,
        "task_index": np.full(length, task_index),
    }
    return {name: column.astype(BOOKKEEPING.get(name, "float32")) for name, column in values.items()}


def _table(encoded: Mapping[str, list[bytes]], columns: Mapping[str, np.ndarray], image_format: str) -> pa.Table:
    arrays: dict[str, pa.Array] = {}
    hugging_face: dict[str, Any] = {}
    suffix = {"png": "png", "jpeg": "jpg"}[image_format]
    for name, frames in encoded.items():
        structs = [{"bytes": data, "path": f"frame_{i:06d}.{suffix}"} for i, data in enumerate(frames)]
        arrays[name] = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        hugging_face[name] = {"_type": "Image"}
    for name, values in columns.items():
        scalar: dict[str, Any] = {"dtype": str(values.dtype), "_type": "Value"}
        if values.ndim == 1:
            arrays[name], hugging_face[name] = pa.array(values), scalar
        else:
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            hugging_face[name] = {"feature": scalar, "length": values.shape[1], "_type": "Sequence"}
    # `datasets` restores its own types (an Image that decodes itself) from this key of the schema
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hugging_face}})})


def _episode_stats(encoded: Mapping[str, list[bytes]], columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Minimum, maximum, mean, standard deviation and count of every column; images in [0, 1] per channel, [3, 1, 1]."""
    stats: dict[str, Any] = {}
    for name, values in columns.items():
        stats[name] = _moments(values.reshape(len(values), -1).astype(np.float64), (0,), len(values))
    for name, frames in encoded.items():
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), STATS_IMAGES)).round().astype(int))
        pixels = np.stack([_decode(frames[i]) for i in chosen]).transpose(0, 3, 1, 2) / 255.0
        moments = _moments(pixels, (0, 2, 3), len(chosen))
        stats[name] = {key: value if key == "count" else [[[x]] for x in value] for key, value in moments.items()}
    return stats


def _moments(values: np.ndarray, axis: tuple[int, ...], count: int) -> dict[str, list[Any]]:
    names = ("min", "max", "mean", "std")
    return {name: getattr(values, name)(axis=axis).tolist() for name in names} | {"count": [count]}


def _info(
    features: dict[str, Any], records: Sequence[Mapping[str, Any]], tasks: int, fps: int, robot_type: str
) -> dict[str, Any]:
    return {
        "codebase_version": "v2.1",
        "robot_type": robot_type,
        "total_episodes": len(records),
        "total_frames": sum(record["length"] for record in records),
        "total_tasks": tasks,
        "total_videos": 0,
        "total_chunks": -(-len(records) // CHUNK_SIZE),
        "chunks_size": CHUNK_SIZE,
        "fps": fps,
        "splits": {"train": f"0:{len(records)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": features,
    }


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
