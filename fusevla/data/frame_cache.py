"""Decoded and resized frames on a fast disk, for sets on slow storage: each is decoded once, then read.

One file per camera holds a fixed-size record for every row, a checksum and the pixels, written when the row is first decoded.
The checksum tells a record that is whole from one that was never written, or only half when a machine went down. Worker
processes share the files: what two of them write for one row is the same.
"""

import dataclasses
import hashlib
import os
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fusevla.arrays import UInt8
from fusevla.data.prepare import source_files

__all__ = ["FrameCache", "open_cache"]

CHECKSUM_BYTES = 4


@dataclasses.dataclass
class FrameCache:
    """Frames of ``size`` x ``size`` by camera and row, in ``folder``. Picklable; the files are opened when first used."""

    folder: Path
    size: int

    def __post_init__(self) -> None:
        self._files: dict[str, int] = {}
        self._full = False

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "size": self.size, "_files": {}, "_full": self._full}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def get(self, camera: str, row: int) -> UInt8[np.ndarray, "size size 3"] | None:
        """The frame (read-only); None where it was not put yet, or not whole."""
        record = os.pread(self.open(camera), self._record, row * self._record)
        pixels = memoryview(record)[CHECKSUM_BYTES:]
        if len(record) < self._record or int.from_bytes(record[:CHECKSUM_BYTES], "little") != zlib.crc32(pixels):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(self.size, self.size, 3)

    def put(self, camera: str, row: int, pixels: UInt8[np.ndarray, "size size 3"]) -> None:
        """Keeps the frame. Once the disk is full nothing more is kept, with one warning: training goes on, more slowly."""
        if self._full:
            return
        data = np.ascontiguousarray(pixels).tobytes()
        record = zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little") + data
        try:
            os.pwrite(self.open(camera), record, row * self._record)
        except OSError as error:
            self._full = True
            warnings.warn(f"{self.folder}: no more frames are kept ({error.strerror}); they are decoded instead", stacklevel=2)

    @property
    def _record(self) -> int:
        return CHECKSUM_BYTES + 3 * self.size**2

    def open(self, camera: str) -> int:
        """The camera's file descriptor; makes the file where there is none. OSError where that cannot be."""
        if camera not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[camera] = os.open(self.folder / f"{camera}-{self.size}.frames", os.O_RDWR | os.O_CREAT, 0o644)
        return self._files[camera]


def open_cache(folder: str | os.PathLike[str], root: Path, cameras: Iterable[str], size: int) -> FrameCache:
    """The cache under ``folder`` of the set in ``root``: named after the set's files, so that a set that changed has another.

    Raises:
        ValueError: ``folder`` cannot be made or written.
    """
    digest = hashlib.sha256()
    for path in source_files(root):
        stat = (root / path).stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    cache = FrameCache(Path(folder).expanduser() / f"{root.name}-{digest.hexdigest()[:16]}", size)
    try:
        for camera in cameras:
            cache.open(camera)
    except OSError as error:
        raise ValueError(f"frame cache: {cache.folder} cannot be written ({error.strerror}); name a folder that can") from None
    return cache
