"""Damage in encoded images that decoders let pass: Pillow skips the check sums of PNG and the warnings of JPEG."""

import re
import struct
import zlib

__all__ = ["check_encoded"]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_STRAY_MARKER = re.compile(rb"\xff[^\x00]")
_HEADER_ONLY = (0xC0, 0xC1)
"""Frame headers of JPEGs with one kind of scan; progressive ones have tables between their scans."""
_STANDARD_TABLE = bytes.fromhex("10000201030302040305050404000001 7d")
"""How the usual Huffman table of luminance begins; in its code, a run of zero bytes spells no picture."""
_BLANK = bytes(64)


def check_encoded(data: bytes) -> None:
    """ValueError when a PNG's check sums or a JPEG's structure say that bytes were changed or lost; others pass."""
    if data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(_JPEG):
        _check_jpeg(data)


def _check_png(data: bytes) -> None:
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("the PNG ends early")
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + size
        if end + 4 > len(data):
            raise ValueError("the PNG ends early")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"the check sum of the PNG's part {kind!r} is wrong")
        position = end + 4


def _check_jpeg(data: bytes) -> None:
    position, frame, restarts = len(_JPEG), 0, False
    while True:
        if position + 4 > len(data) or data[position] != 0xFF:
            raise ValueError(f"the JPEG has no marker at byte {position}")
        marker, size = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        part = data[position + 4 : position + 2 + size]
        if size < 2 or len(part) != size - 2:
            raise ValueError("the JPEG ends early")
        if marker == 0xDB and part[0] >> 4 == 0 and 0 in _quantisation(part):
            raise ValueError("the JPEG's quantisation table has a zero")
        frame = marker if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) else frame
        restarts |= marker == 0xDD
        position += 2 + size
        if marker == 0xDA:
            break
    _check_scan(data, position, single=frame in _HEADER_ONLY and not restarts)


def _quantisation(part: bytes) -> bytes:
    return b"".join(part[start + 1 : start + 65] for start in range(0, len(part), 65))


def _check_scan(data: bytes, start: int, single: bool) -> None:
    end = data.rfind(b"\xff\xd9")
    if end < start:
        raise ValueError("the JPEG ends early")
    stray = _STRAY_MARKER.search(data, start, end) if single else None
    if stray and data[stray.start() + 1] not in (0xC4, 0xDA, 0xFF):  # more scans, or fill bytes
        raise ValueError(f"the JPEG's picture has a stray marker at byte {stray.start()}")
    if single and _STANDARD_TABLE in data[:start] and data.find(_BLANK, start, end) >= 0:
        raise ValueError("part of the JPEG's picture is blanked")
