"""Values to bytes and back: msgpack with NumPy arrays, byte for byte as openpi's client writes and reads them.

An array is the map ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}``, a NumPy scalar ``{b"__npgeneric__": True,
b"data", b"dtype"}``. What comes in is not trusted: nothing is evaluated or unpickled, and memory stays in proportion to the
bytes received. Source: openpi ``openpi_client/msgpack_numpy.py``@15a9616a.
"""

import math
import re
from typing import Any, Final

import msgpack
import numpy as np

__all__ = ["MAX_CONTAINERS", "WireError", "pack", "unpack"]

MAX_CONTAINERS: Final = 512
"""Maps and lists in one message; an observation has about ten."""
_MAX_ENTRIES: Final = 1024
_MAX_SCALAR: Final = 1 << 16
_REFUSED: Final = "VOc"
_DTYPE = re.compile(r"[<>|=]?[biufSUmM]\d{1,9}(\[\w+\])?")


class WireError(ValueError):
    """A message that is not what the protocol says. The text is for whoever sent it."""


def pack(value: object) -> bytes:
    """Maps, lists, strings, numbers, bytes, None and NumPy arrays of any of these.

    Raises ``WireError`` for arrays of objects, records or complex numbers.
    """
    packed: Any = msgpack.packb(value, default=_packed)
    return packed


def unpack(data: bytes) -> Any:
    """The value that ``pack`` wrote; arrays are read-only views of what was received.

    Raises ``WireError`` for anything else.
    """
    count = 0

    def counted(found: Any) -> Any:
        nonlocal count
        count += 1
        if count > MAX_CONTAINERS:
            raise WireError(f"message: expected at most {MAX_CONTAINERS} maps and lists")
        return _unpacked(found) if isinstance(found, dict) else found

    try:
        return msgpack.unpackb(
            data,
            object_hook=counted,
            list_hook=counted,
            ext_hook=_no_extension,
            max_array_len=_MAX_ENTRIES,
            max_map_len=_MAX_ENTRIES,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(
            f"message: expected one msgpack map, lists of at most {_MAX_ENTRIES}; of {len(data)} bytes: {error}"
        ) from error


def _packed(value: object) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"pack: expected plain values and NumPy arrays, got {type(value).__name__}")
    if value.dtype.kind in _REFUSED:
        raise WireError(f"pack: expected numbers or text, got an array of dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(_dtype(found), found.get(b"data"), found.get(b"shape"))
    if b"__npgeneric__" in found:
        return _scalar(_dtype(found), found.get(b"data"))
    return found


def _dtype(found: dict[Any, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise WireError(f"dtype: expected numbers or text such as '<f4' or '|u1', got {str(name)[:40]!r}")
    return np.dtype(name)


def _array(dtype: np.dtype, data: object, shape: object) -> np.ndarray:
    if not isinstance(data, bytes):
        raise WireError(f"array: expected its data as bytes, got {type(data).__name__}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
        raise WireError("array: expected a shape of at most 8 sizes >= 0")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"array: {shape} of {dtype.str} takes {math.prod(shape) * dtype.itemsize} bytes, got {len(data)}")
    if dtype.kind == "U" and not _is_unicode(np.frombuffer(data, dtype.byteorder + "u4")):
        raise WireError("array: expected text, got what is no Unicode")
    return np.ndarray(shape, dtype, buffer=data)


def _is_unicode(codes: np.ndarray) -> bool:
    """What is none makes Python's strings fail in unforeseen places."""
    return not np.any((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000)))


def _scalar(dtype: np.dtype, data: object) -> Any:
    if not isinstance(data, bool | int | float | str | bytes) or dtype.itemsize > _MAX_SCALAR:
        raise WireError(f"scalar: expected a value of dtype {dtype.str[:20]}, got {type(data).__name__}")
    return np.array(data, dtype)[()]


def _no_extension(code: int, data: bytes) -> Any:
    raise WireError(f"message: expected no msgpack extension types, got {code} of {len(data)} bytes")
