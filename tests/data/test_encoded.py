"""Damage that Pillow lets pass."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusevla.data.encoded import check_encoded

SMOOTH = np.add.outer(np.arange(96), 2 * np.arange(96))[..., None].repeat(3, -1).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def encode(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("image", [SMOOTH, NOISE, np.zeros((64, 64, 3), np.uint8)], ids=["smooth", "noise", "black"])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "png"},
        {"format": "png", "compress_level": 0},
        *[{"format": "jpeg", "quality": quality, "subsampling": s} for quality in (30, 75, 95, 100) for s in (0, 2)],
        {"format": "jpeg", "progressive": True},
        {"format": "jpeg", "optimize": True},
        {"format": "jpeg", "restart_marker_blocks": 2},
    ],
    ids=str,
)
def test_good_images_pass(image: np.ndarray, options: dict[str, object]) -> None:
    check_encoded(encode(image, **options))
    check_encoded(encode(image, **options) + bytes(7))  # some cameras pad


@given(at=st.integers(8, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_png_is_noticed(at: int, bit: int) -> None:
    data = bytearray(encode(SMOOTH, format="png"))
    data[8 + at % (len(data) - 8)] ^= 1 << bit
    with pytest.raises(ValueError, match="PNG"):
        check_encoded(bytes(data))


@pytest.mark.parametrize("form", ["png", "jpeg"])
@given(keep=st.integers(8, 10**6))
def test_a_cut_image_is_noticed(form: str, keep: int) -> None:
    data = encode(SMOOTH, format=form)
    with pytest.raises(ValueError, match="early"):
        check_encoded(data[: 8 + keep % (len(data) - 10)])


@pytest.mark.parametrize(("damage", "message"), [(b"\xff\x03", "stray marker"), (bytes(100), "blanked")])
def test_damage_within_the_picture_of_a_jpeg(damage: bytes, message: str) -> None:
    data = encode(SMOOTH.repeat(3, 0), format="jpeg", quality=95)
    middle = len(data) * 2 // 3
    with pytest.raises(ValueError, match=message):
        check_encoded(data[:middle] + damage + data[middle + len(damage) :])


def test_blanked_tables_of_a_jpeg_are_noticed() -> None:
    data = encode(NOISE, format="jpeg", quality=95)
    with pytest.raises(ValueError, match="quantisation"):
        check_encoded(data[:30] + bytes(20) + data[50:])


def test_other_bytes_are_left_to_the_decoder() -> None:
    check_encoded(b"")
    check_encoded(b"GIF89a")
