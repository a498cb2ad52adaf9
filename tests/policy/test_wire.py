"""The wire format against a twin that does what openpi's client does, and what is refused."""

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusevla.policy.wire import MAX_CONTAINERS, WireError, pack, unpack
from tests.policy.robot import from_bytes, to_bytes

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.unicode_string_dtypes(max_len=4),
    hnp.byte_string_dtypes(max_len=4),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
# msgpack writes scalars that are Python floats or texts as such, openpi's no less
NUMPY_SCALARS = hnp.arrays(DTYPES, ()).map(lambda x: x[()]).filter(lambda x: not isinstance(x, float | str | bytes))
VALUES = st.recursive(
    PLAIN | ARRAYS | NUMPY_SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or (a != a and b != b))


@given(VALUES)
def test_what_is_packed_is_read_again_here_and_by_openpi(value: object) -> None:
    assert same(value, unpack(pack(value)))
    assert pack(value) == to_bytes(value)
    assert same(value, from_bytes(pack(value)))


def test_the_bytes_are_openpis() -> None:
    expected = (
        b"\x81\xa1x\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x04\x01\x00\x02\x00\xc4\x05dtype\xa3<u2\xc4\x05shape\x92\x01\x02"
    )
    assert pack({"x": np.array([[1, 2]], "<u2")}) == expected
    assert pack(np.float32(0.5)) == b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcb?\xe0\0\0\0\0\0\0\xc4\x05dtype\xa3<f4"


@pytest.mark.parametrize("value", [np.zeros(2, complex), np.array([None]), np.zeros(1, "f4,i4"), np.complex64(1)])
def test_objects_records_and_complex_numbers_are_not_sent(value: object) -> None:
    with pytest.raises(WireError, match="numbers or text"):
        pack({"x": value})


def test_what_has_no_place_on_the_wire_is_not_sent() -> None:
    with pytest.raises(TypeError, match="set"):
        pack({"x": {1, 2}})


def array(**changed: object) -> dict[bytes, Any]:
    good = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]}
    return {key.encode(): value for key, value in {**good, **changed}.items() if value is not None}


def scalar(dtype: object, data: object) -> dict[bytes, Any]:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


REFUSED = {
    "object": array(dtype="|O", shape=[1]),
    "void": array(dtype="|V4"),
    "complex": array(dtype="<c8", shape=[1]),
    "record": array(dtype="f4,f4", shape=[1]),
    "no dtype": array(dtype=None),
    "dtype is a number": array(dtype=4),
    "unknown dtype": array(dtype="<f3"),
    "no data": array(data=None),
    "text as data": array(data="abcdefgh"),
    "no shape": array(shape=None),
    "negative": array(shape=[-2]),
    "too few bytes": array(shape=[3]),
    "too many bytes": array(shape=[1]),
    "absurd size": array(shape=[2**40, 2**40]),
    "absurd and empty": array(shape=[2**62, 2**62, 0], data=b""),
    "surrogate": array(dtype="<U2", shape=[1], data=b"a\0\0\0\0\xd8\0\0"),
    "beyond Unicode": array(dtype=">U1", shape=[], data=b"\0\x11\0\0"),
    "fractions": array(shape=[2.0]),
    "booleans": array(shape=[True, 2]),
    "many dimensions": array(shape=[1] * 9 + [2]),
    "complex scalar": scalar("<c8", 1.0),
    "object scalar": scalar("|O", 1),
    "list as a scalar": scalar("<f4", [1.0]),
    "out of range": scalar("|i1", 1000),
    "no number": scalar("<f4", "abc"),
    "huge text": scalar("<U999999999", "a"),
    "extension": msgpack.ExtType(4, b"x"),
    "many maps": [{} for _ in range(MAX_CONTAINERS)],
    "long list": [0] * 5000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(WireError):
        unpack(msgpack.packb({"x": REFUSED[name]}))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x81", b"\x80\x80", b"\x81\xa1\xff\x01", b"\x91" * 2000, b"\x81\x01\x02", b"\xdf" + b"\xff" * 4]
)
def test_no_message(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    try:
        unpack(data)
    except WireError:
        return


@given(st.data())
def test_any_damage_gives_a_value_or_is_refused(data: st.DataObject) -> None:
    message = bytearray(pack({"observation/state": np.arange(3.0), "prompt": "go", "n": np.int8(4)}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(message))
    except WireError:
        return
