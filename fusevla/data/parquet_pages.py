"""Random access to single values of a binary parquet column, reading one page (about 1 MB) instead of a row group.

Parquet files of robot episodes hold encoded images in row groups of tens of megabytes (LeRobot v3.0: one row group per
file of 100 MB), and Arrow reads whole row groups. A shuffled reader wants one image out of each: this module walks the
page headers of a column chunk once, then decompresses the one page that holds the row. Format: the Apache Parquet
specification (``parquet.thrift``, "Data Pages"). What it does not cover falls back to Arrow in ``ByteColumn.read``.
"""

import bisect
import dataclasses
import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["ByteColumn", "PageCache", "UnsupportedPageError"]

CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli", "UNCOMPRESSED": None}
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
HEADER_BYTES = 1 << 14


class UnsupportedPageError(Exception):
    """The column is stored in a way that this module does not read; Arrow does."""


class PageCache:
    """The most recently used decompressed pages, bounded in bytes; shared by the columns of a set, safe between threads."""

    def __init__(self, max_bytes: int = 128 << 20) -> None:
        self._max_bytes = max_bytes
        self._pages: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any | None:
        """The value stored for ``key``, or None."""
        with self._lock:
            if key not in self._pages:
                return None
            self._pages.move_to_end(key)
            return self._pages[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Remember ``value`` (of ``size`` bytes) and forget the least recently used until the bound holds."""
        with self._lock:
            if key in self._pages or size > self._max_bytes:
                return
            self._pages[key] = (value, size)
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._pages.popitem(last=False)[1][1]


@dataclasses.dataclass(frozen=True)
class _Page:
    """A data page: where its payload lies, which rows it has and how it is encoded."""

    offset: int
    compressed: int
    uncompressed: int
    first_row: int
    rows: int
    encoding: int
    levels: int
    """Bytes of uncompressed definition levels before the values (v2 pages); -1 for v1 pages."""
    is_compressed: bool


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One column chunk (a column in a row group): its pages and its dictionary page, if any."""

    pages: tuple[_Page, ...]
    dictionary: _Page | None
    codec: str | None
    max_level: int


class ByteColumn:
    """The values of one binary leaf column of one parquet file, by row.

    ``leaf`` is the dotted path of the leaf (``image.bytes``). Values are ``bytes`` or None. Safe between threads.
    """

    def __init__(self, path: Path, leaf: str, cache: PageCache) -> None:
        self._path, self._leaf, self._cache = path, leaf, cache
        self._metadata = pq.read_metadata(path)
        groups = range(self._metadata.num_row_groups)
        self._starts = np.cumsum([0, *(self._metadata.row_group(i).num_rows for i in groups)]).tolist()
        self._chunks: dict[int, _Chunk] = {}
        self._arrow_only = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row: int) -> bytes | None:
        """The value at ``row`` (0-based in the file). IndexError outside; Arrow's errors and OSError for a damaged file."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self._path}, which has {len(self)}")
        group = bisect.bisect_right(self._starts, row) - 1
        if not self._arrow_only:
            try:
                return self._read_page(group, row - self._starts[group])
            except (
                UnsupportedPageError,
                struct.error,
                LookupError,
                ValueError,
                OverflowError,
                RecursionError,
                pa.ArrowException,
            ):
                self._arrow_only = True  # Arrow reads it, or says what is wrong with it
        return self._read_group(group)[row - self._starts[group]]

    def _read_group(self, group: int) -> list[bytes | None]:
        key = (self._path, self._leaf, group, "arrow")
        values = self._cache.get(key)
        if values is None:
            table = pq.ParquetFile(self._path).read_row_group(group, columns=[self._leaf], use_threads=False)
            column = table.column(0).combine_chunks()
            for name in self._leaf.split(".")[1:]:
                column = pc.struct_field(column, name)
            values = column.to_pylist()
            self._cache.put(key, values, sum(len(value or b"") for value in values))
        return values

    def _read_page(self, group: int, row: int) -> bytes | None:
        chunk = self._chunks.get(group)
        if chunk is None:
            chunk = self._chunks[group] = _walk_pages(self._path, self._metadata, group, self._leaf)
        page = chunk.pages[bisect.bisect_right(chunk.pages, row, key=lambda page: page.first_row) - 1]
        return _value(self._payload(chunk, page), chunk, page, row - page.first_row, lambda: self._dictionary(chunk))

    def _payload(self, chunk: _Chunk, page: _Page) -> bytes:
        key = (self._path, page.offset)
        payload = self._cache.get(key)
        if payload is None:
            payload = _decompress(_pread(self._path, page.offset, page.compressed), chunk, page)
            self._cache.put(key, payload, len(payload))
        return payload

    def _dictionary(self, chunk: _Chunk) -> bytes:
        if chunk.dictionary is None:
            raise UnsupportedPageError("dictionary-encoded page without a dictionary")
        return self._payload(chunk, chunk.dictionary)


def _pread(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _walk_pages(path: Path, metadata: pq.FileMetaData, group: int, leaf: str) -> _Chunk:
    """Read the page headers of one column chunk."""
    row_group = metadata.row_group(group)
    index = next((i for i in range(row_group.num_columns) if row_group.column(i).path_in_schema == leaf), None)
    if index is None:
        raise UnsupportedPageError(f"no leaf {leaf}")
    column, schema = row_group.column(index), metadata.schema.column(index)
    if column.physical_type != "BYTE_ARRAY" or schema.max_repetition_level or column.compression not in CODECS:
        raise UnsupportedPageError(f"{column.physical_type} {column.compression}")
    offset = column.data_page_offset
    if column.dictionary_page_offset:
        offset = min(offset, column.dictionary_page_offset)
    end, rows, pages, dictionary = offset + column.total_compressed_size, 0, [], None
    while offset < end and rows < row_group.num_rows:
        header, size = _page_header(path, offset)
        page = _page(header, offset + size, rows)
        if not 0 <= page.compressed <= end - page.offset or not 0 <= page.uncompressed <= column.total_uncompressed_size:
            raise ValueError("a page reaches past its column: the file is damaged")
        offset = page.offset + page.compressed
        if header[1] == DICTIONARY_PAGE:
            dictionary = page
        elif header[1] in (DATA_PAGE, DATA_PAGE_V2):
            pages.append(page)
            rows += page.rows
    if rows != row_group.num_rows:
        raise UnsupportedPageError(f"{rows} rows in pages, {row_group.num_rows} in the row group")
    return _Chunk(tuple(pages), dictionary, CODECS[column.compression], schema.max_definition_level)


def _page_header(path: Path, offset: int) -> tuple[dict[int, Any], int]:
    """The Thrift struct at ``offset`` and its size in bytes."""
    size = HEADER_BYTES
    while True:
        data = _pread(path, offset, size)
        try:
            return _thrift_struct(data, 0)
        except IndexError:  # page statistics may make a header longer than expected
            if len(data) < size or size > 1 << 24:
                raise
            size *= 8


def _page(header: dict[int, Any], offset: int, first_row: int) -> _Page:
    """Field numbers are those of ``PageHeader`` in parquet.thrift."""
    kind, detail = header[1], header.get(8) or header.get(5) or header.get(7) or {}
    version2 = kind == DATA_PAGE_V2
    return _Page(
        offset=offset,
        compressed=header[3],
        uncompressed=header[2],
        first_row=first_row,
        rows=detail.get(1, 0),
        encoding=detail.get(4 if version2 else 2, PLAIN),
        levels=detail.get(5, 0) if version2 else -1,
        is_compressed=detail.get(7, True) if version2 else True,
    )


def _decompress(data: bytes, chunk: _Chunk, page: _Page) -> bytes:
    if len(data) != page.compressed:
        raise ValueError("the file ends inside a page")
    if chunk.codec is None or not page.is_compressed:
        return data
    plain = max(page.levels, 0)  # the levels of a v2 page are never compressed
    return data[:plain] + pa.decompress(data[plain:], page.uncompressed - plain, codec=chunk.codec, asbytes=True)


def _value(payload: bytes, chunk: _Chunk, page: _Page, row: int, dictionary: Any) -> bytes | None:
    """Value ``row`` of a decompressed page."""
    position = 0
    if chunk.max_level:
        size = page.levels
        if page.levels < 0:
            size, position = struct.unpack_from("<I", payload)[0], 4
        width = chunk.max_level.bit_length()
        present = _hybrid(payload[position : position + size], width, page.rows) == chunk.max_level
        if not present[row]:
            return None
        row, position = int(present[:row].sum()), position + size
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        indices = _hybrid(payload[position + 1 :], payload[position], row + 1)
        payload, position, row = dictionary(), 0, int(indices[row])
    elif page.encoding != PLAIN:
        raise UnsupportedPageError(f"encoding {page.encoding}")
    for _ in range(row):
        position += 4 + struct.unpack_from("<I", payload, position)[0]
    size = struct.unpack_from("<I", payload, position)[0]
    if position + 4 + size > len(payload):
        raise ValueError("a value reaches past its page")
    return payload[position + 4 : position + 4 + size]


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """Decode ``count`` integers of ``width`` bits in parquet's hybrid of run lengths and bit packing."""
    parts: list[np.ndarray] = []
    position = found = 0
    while found < count:
        header, position = _varint(data, position)
        if header & 1:
            size = (header >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[position : position + size], np.uint8), bitorder="little")
            values = bits[: len(bits) - len(bits) % width if width else 0].reshape(-1, max(width, 1)).astype(np.int64)
            parts.append(values @ (1 << np.arange(values.shape[1])) if width else np.zeros((header >> 1) * 8, np.int64))
        else:
            size = (width + 7) // 8
            parts.append(np.full(min(header >> 1, count), int.from_bytes(data[position : position + size], "little")))
        if len(parts[-1]) == 0:
            raise ValueError("an empty run")
        position += size
        found += len(parts[-1])
    return np.concatenate(parts)[:count] if parts else np.zeros(0, np.int64)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _thrift_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as {field number: value}, and the position after it."""
    fields: dict[int, Any] = {}
    number = 0
    while data[position]:
        byte = data[position]
        position += 1
        if byte >> 4:
            number += byte >> 4
        else:
            zigzag, position = _varint(data, position)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        fields[number], position = _thrift_value(data, position, byte & 15)
    return fields, position + 1


def _thrift_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, position
    if kind in (4, 5, 6):
        zigzag, position = _varint(data, position)
        return (zigzag >> 1) ^ -(zigzag & 1), position
    if kind == 8:
        size, position = _varint(data, position)
        if position + size > len(data):
            raise IndexError("a field reaches past the bytes read")
        return data[position : position + size], position + size
    if kind == 12:
        return _thrift_struct(data, position)
    raise UnsupportedPageError(f"Thrift type {kind} in a page header")
