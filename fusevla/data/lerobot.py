"""LeRobot folders, v2.0, v2.1 and v3.0, read with pyarrow alone: numbers in memory, images one by one when asked for.

``open_set`` checks everything but the pixels and reports every defect at once. Images inside parquet need nothing else;
video columns go through PyAV, imported when the first frame is asked for.
"""

import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from fusevla.data.encoded import check_encoded
from fusevla.data.lerobot_columns import find_column
from fusevla.data.lerobot_meta import Defects, EpisodeRecord, LeRobotError, SetMeta, VideoSpan, read_meta
from fusevla.data.lerobot_tables import EpisodeTable, check_steps, read_tables
from fusevla.data.lerobot_write import EpisodeFrames, encode_image, write_lerobot_v21
from fusevla.data.parquet_pages import ByteColumn, PageCache

__all__ = [
    "Episode",
    "EpisodeFrames",
    "LeRobotError",
    "LeRobotSet",
    "encode_image",
    "inspect_set",
    "open_set",
    "write_lerobot_v21",
]

NUMBERS = ("state", "actions")


@dataclasses.dataclass(frozen=True)
class Episode:
    """``index`` is the episode's number in the set (annotations refer to it), ``length`` its frames, ``task`` the instruction."""

    index: int
    length: int
    task: str


class LeRobotSet:
    """A checked LeRobot folder.

    Rows are the frames of all episodes in order of episode number, 0 to ``len(set) - 1``; ``i`` below is the *position* of an
    episode in ``episodes``, not its number. Picklable (worker processes reopen the files) and safe between threads.

    Attributes:
        root, version, fps: the folder, ``v2.0`` / ``v2.1`` / ``v3.0``, frames per second.
        episodes: ``tuple[Episode, ...]``, ascending by number.
        state: float32 [rows, state_dim]; actions: float32 [rows, action_dim], as stored.
        cameras: camera name -> column; columns: the same with ``state`` and ``actions``.
        info: info.json.
    """

    def __init__(self, meta: SetMeta, tables: Sequence[EpisodeTable], columns: dict[str, str]) -> None:
        self.root, self.version, self.fps, self.info = meta.root, meta.version, meta.fps, meta.info
        self.episodes = tuple(Episode(e.index, e.length, t.task) for e, t in zip(meta.episodes, tables, strict=True))
        self.state = np.concatenate([table.state for table in tables])
        self.actions = np.concatenate([table.actions for table in tables])
        self.columns = dict(columns)
        self.cameras = {name: column for name, column in columns.items() if name not in NUMBERS}
        self._starts = np.cumsum([0, *(episode.length for episode in self.episodes)])
        self._records: tuple[EpisodeRecord, ...] = meta.episodes
        self._first_rows = [table.first_row for table in tables]
        self._shapes = {column: tuple(meta.features[column]["shape"]) for column in self.cameras.values()}
        self._reset()

    def _reset(self) -> None:
        self._cache = PageCache()
        self._columns: dict[tuple[Path, str], ByteColumn | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_cache", "_columns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self.actions)

    def __repr__(self) -> str:
        return f"LeRobotSet({str(self.root)!r}, {self.version}, {len(self.episodes)} episodes, {len(self)} frames)"

    def episode_slice(self, i: int) -> slice:
        """The rows of episode ``i`` (a position in ``episodes``)."""
        return slice(int(self._starts[i]), int(self._starts[i + 1]))

    def locate(self, row: int) -> tuple[int, int]:
        """(position of the episode, frame in it) of a row. IndexError outside the set."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.root}, which has {len(self)} frames")
        i = int(np.searchsorted(self._starts, row, side="right")) - 1
        return i, row - int(self._starts[i])

    def image(self, camera: str, row: int, strict: bool = False) -> np.ndarray:
        """The frame of ``camera`` at ``row``, uint8 [H, W, 3]; otherwise as ``picture``."""
        return np.asarray(self.picture(camera, row, strict))

    def picture(self, camera: str, row: int, strict: bool = False) -> Image.Image:
        """The frame as Pillow's RGB image, to be resized without a copy. LeRobotError when missing or not to be decoded.

        ``strict`` also refuses encoded bytes that a decoder lets pass (``check_encoded``): to validate a set.
        """
        i, frame = self.locate(row)
        column = self.cameras[camera]
        record = self._records[i]
        try:
            if column in record.videos:
                from fusevla.data.video import read_frame

                span = record.videos[column]
                pixels = read_frame(span.path, span.start + frame / self.fps, self.fps)
                return self._checked(Image.fromarray(pixels), column)
            return self._checked(self._stored(record.path, column, self._first_rows[i] + frame, strict), column)
        except Exception as error:  # decoders raise whatever they like on damaged bytes
            if isinstance(error, MemoryError):
                raise
            where = record.videos[column].path if column in record.videos else record.path
            problem = f"{column} of episode {record.index}, frame {frame} cannot be decoded ({type(error).__name__}: {error})."
            raise LeRobotError(self.root, [f"{where.relative_to(self.root)}: {problem}"]) from error

    def files(self) -> dict[Path, set[str]]:
        """The parquet files of the episodes, each with the columns that are kept in videos beside it."""
        return {record.path: set(record.videos) for record in self._records}

    def videos(self, i: int) -> dict[str, VideoSpan]:
        """Camera -> its part of a video file, of episode ``i`` (a position); cameras kept as images are left out."""
        spans = self._records[i].videos
        return {camera: spans[column] for camera, column in self.cameras.items() if column in spans}

    def _checked(self, image: Image.Image, column: str) -> Image.Image:
        shape, height, width = self._shapes[column], image.height, image.width
        if shape not in ((height, width, 3), (3, height, width)):  # info.json has either order
            raise ValueError(f"info.json says {list(shape)}, the image is {[height, width, 3]}")
        return image

    def _stored(self, path: Path, column: str, row: int, strict: bool) -> Image.Image:
        key = (path, column)
        if key not in self._columns:
            leaf = _leaf(pq.read_schema(path).field(column))
            self._columns[key] = ByteColumn(path, leaf, self._cache) if leaf else None
        reader = self._columns[key]
        if reader is None:
            return Image.fromarray(_raw_pixels(path, column, row, self._shapes[column]))
        data = reader.read(row)
        data = self._beside(path, column, row) if data is None else data
        if strict:
            check_encoded(data)
        return decode_image(data)

    def _beside(self, path: Path, column: str, row: int) -> bytes:
        """Some v2.0 sets store only the name of an image file."""
        name = ByteColumn(path, f"{column}.path", self._cache).read(row)
        file = self.root / (name or b"").decode()
        if not name or not file.resolve().is_relative_to(self.root.resolve()):
            raise ValueError("it has neither bytes nor the name of a file in the set's folder")
        return file.read_bytes()


def decode_image(data: bytes) -> Image.Image:
    """PNG or JPEG bytes -> RGB. Raises what Pillow raises for damaged bytes."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"neither PNG nor JPEG: {len(data)} bytes that begin with {data[:8]!r}") from None


def _leaf(field: pa.Field) -> str | None:
    """Dotted path of the leaf with encoded bytes; None for a column of plain numbers."""
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{field.name}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return field.name
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return None
    raise TypeError(f"an image column holds {{bytes, path}}, bytes or lists of numbers; {field.name!r} is {kind}")


def _raw_pixels(path: Path, column: str, row: int, shape: tuple[int, ...]) -> np.ndarray:
    """An image stored as nested lists of numbers."""
    value: Any = pq.read_table(path, columns=[column], use_threads=False).column(0)[row].values
    while not pa.types.is_integer(value.type):
        value = value.flatten()
    pixels = value.to_numpy(zero_copy_only=False)
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"grey levels must be 0 to 255; got {pixels.min()} to {pixels.max()}")
    image = pixels.astype(np.uint8).reshape(shape)
    return image.transpose(1, 2, 0) if shape[0] == 3 and shape[2] != 3 else image


def open_set(
    root: str | Path, columns: Iterable[Sequence[str]] = (), cameras: Sequence[str] = ("base_0_rgb", "left_wrist_0_rgb")
) -> LeRobotSet:
    """Open the LeRobot folder ``root``.

    Args:
        root: the folder that holds ``meta`` and ``data``.
        columns: (name, column) pairs for what is not recognised (``DataConfig.columns``).
        cameras: the cameras to find; others in the set are left alone.

    Raises:
        LeRobotError: listing every defect: files missing or truncated, columns not found, wrong dimensions, NaN, an
            info.json that disagrees with what it describes. Pixels are checked when they are read.
    """
    defects = Defects(Path(root).expanduser())
    data, _ = inspect_set(defects.root, columns, cameras, defects)
    defects.stop_if_any()
    if data is None:
        raise LeRobotError(root, ["nothing can be read."])
    return data


def inspect_set(
    root: Path, columns: Iterable[Sequence[str]], cameras: Sequence[str], defects: Defects
) -> tuple[LeRobotSet | None, dict[int, int]]:
    """As ``open_set``, but what is wrong is noted in ``defects`` and the rest of the set is read all the same.

    Returns:
        The set, and the length of every episode that it lists by number. After a defect the set is there for its images (its
        numbers and the episodes that cannot be read are left out); None where nothing is left.
    """
    meta = read_meta(root, defects)
    if meta is None:
        return None, {}
    lengths = {episode.index: episode.length for episode in meta.episodes}
    columns = [tuple(pair) for pair in columns]
    found: dict[str, str] = {}
    for name in (*NUMBERS, *cameras):
        visual = name not in NUMBERS
        available = [key for key, feature in meta.features.items() if (feature["dtype"] in ("image", "video", "uint8")) == visual]
        try:
            found[name] = find_column(name, available, columns)
        except ValueError as error:
            defects.add("meta/info.json", str(error))
    found = {name: column for name, column in found.items() if name in NUMBERS or _is_visual(meta, column, defects)}
    images = {name: column for name, column in found.items() if name not in NUMBERS}
    if len(found) == len(images) or not meta.episodes:
        return None, lengths
    tables = read_tables(meta, found.get("state"), found.get("actions"), list(images.values()), defects)
    check_steps(meta, tables, defects)
    pairs = [(record, _without_numbers(table) if defects else table) for record, table in zip(meta.episodes, tables) if table]
    good = tuple(dataclasses.replace(record, length=len(table.actions)) for record, table in pairs)
    lengths |= {record.index: record.length for record in good}
    return LeRobotSet(dataclasses.replace(meta, episodes=good), [t for _, t in pairs], found) if pairs else None, lengths


def _without_numbers(table: EpisodeTable) -> EpisodeTable:
    return dataclasses.replace(table, state=table.state[:, :0], actions=table.actions[:, :0])


def _is_visual(meta: SetMeta, column: str, defects: Defects) -> bool:
    shape = meta.features[column]["shape"]
    if len(shape) == 3 and 3 in (shape[0], shape[-1]):
        return True
    defects.add("meta/info.json", f"camera {column!r} must be [height, width, 3] or [3, height, width]; got {shape}.")
    return False
