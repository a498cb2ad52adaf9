import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from fusevla.arrays import Array
from fusevla.data.augment import augment, color_jitter, crop_rotate, resize_with_pad_jax
from fusevla.data.transforms import action_chunk, pad_dim, padded_box, resize_with_pad
from fusevla.presets import AugmentConfig
from tests import references_images

ROOT = Path(__file__).parents[2]
CANDIDATES = [os.environ.get("FUSEVLA_GOLDEN"), ROOT.parent / "shared/golden", ROOT / "tests/golden"]
OFF = AugmentConfig(crop=1.0, rotate_degrees=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    for folder in CANDIDATES:
        if folder and (Path(folder) / "images.npz").is_file():
            return dict(np.load(Path(folder) / "images.npz"))
    pytest.skip("no golden images.npz")


def resize_cases(golden: dict[str, np.ndarray]) -> list[str]:
    return sorted({name.rsplit("/", 1)[0] for name in golden if name.startswith("resize/")})


# Resizing


def test_resize_agrees_with_the_goldens(golden: dict[str, np.ndarray]) -> None:
    for case in resize_cases(golden):
        image, (height, width) = golden[f"{case}/in_uint8"], golden[f"{case}/target"].tolist()
        # One value lies on a rounding boundary: compile as users do, with the passes that conftest turns off.
        resize = jax.jit(resize_with_pad_jax, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 3})
        np.testing.assert_array_equal(resize(image, height, width), golden[f"{case}/jax_uint8"])
        as_float = image.astype(np.float32) / np.float32(255) * 2 - 1
        np.testing.assert_allclose(resize_with_pad_jax(as_float, height, width), golden[f"{case}/jax_float"], atol=1e-6)
        single = resize_with_pad_jax(as_float[0], height, width)
        np.testing.assert_allclose(single[:4], golden[f"{case}/jax_float_single"], atol=1e-6)


def test_host_resize_is_within_one_grey_level_of_the_device(golden: dict[str, np.ndarray]) -> None:
    for case in resize_cases(golden):
        height, width = golden[f"{case}/target"].tolist()
        host = np.stack([resize_with_pad(image, height, width) for image in golden[f"{case}/in_uint8"]])
        assert np.abs(host.astype(int) - golden[f"{case}/jax_uint8"]).max() <= 1
        np.testing.assert_array_equal(host, golden[f"{case}/pil_client_uint8"])


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60))
def test_padded_box_keeps_the_aspect_inside_the_target(height: int, width: int, target_height: int, target_width: int) -> None:
    top, left, inner_height, inner_width = padded_box(height, width, target_height, target_width)
    assert 1 <= inner_height <= target_height
    assert 1 <= inner_width <= target_width
    # truncation as in the reference: rounding errors may cost one pixel
    assert inner_height >= target_height - 1 or inner_width >= target_width - 1
    assert top == (target_height - inner_height) // 2
    assert left == (target_width - inner_width) // 2
    scale = min(target_height / height, target_width / width)
    assert abs(inner_height - height * scale) <= 1
    assert abs(inner_width - width * scale) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 50), st.integers(2, 50), st.integers(0, 255))
def test_resized_plain_colour_stays_plain_and_padding_is_black(height: int, width: int, level: int) -> None:
    out = resize_with_pad(np.full((height, width, 3), level, np.uint8), 28, 20)
    top, left, inner_height, inner_width = padded_box(height, width, 28, 20)
    inside = np.zeros((28, 20), bool)
    inside[top : top + inner_height, left : left + inner_width] = True
    assert (out[inside] == level).all()
    assert (out[~inside] == 0).all()


def test_same_size_is_left_alone_and_other_dtypes_are_refused() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert resize_with_pad(image, 8, 8) is image
    for bad in (image.astype(np.float32), image[..., :1], image[0]):
        with pytest.raises((ValueError, TypeCheckError), match=r"uint8|UInt8"):  # in tests the shape check speaks first
            resize_with_pad(bad, 4, 4)


# Augmentation


def test_geometry_agrees_with_the_goldens(golden: dict[str, np.ndarray]) -> None:
    for i, image in enumerate(golden["aug/in01"]):
        size = int(0.95 * image.shape[0])
        out = crop_rotate(image, golden["aug/crop_center_yx"][i], golden["aug/theta_rad"][[i]].reshape(()), (size, size))
        expected = golden["aug/geometric_only"][i]
        assert np.linalg.norm(out - expected) < 1e-5 * np.linalg.norm(expected)


@settings(deadline=None, max_examples=20)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-0.6, 0.6), st.sampled_from([4, 7, 8]), st.sampled_from([5, 10]))
def test_geometry_agrees_with_loops(dy: float, dx: float, angle: float, crop_height: int, crop_width: int) -> None:
    image = np.random.default_rng(0).uniform(size=(8, 10, 3)).astype(np.float32)
    center, crop = np.array([dy, dx], np.float32), (crop_height, crop_width)
    expected = references_images.crop_rotate(image, center, angle, crop)
    out = jax.jit(crop_rotate, static_argnums=3)(image, center, np.float32(angle), crop)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9), st.floats(-1, 1))
def test_colour_agrees_with_hsv_loops(brightness: float, contrast: float, saturation: float) -> None:
    image = np.random.default_rng(1).uniform(size=(4, 5, 3)).astype(np.float32)
    image[0, :3] = np.array([0, 1, 0.5])[:, None]  # black, white, grey
    draws = [np.float32(x) for x in (brightness, contrast, saturation)]
    out = np.asarray(jax.jit(color_jitter)(image, *draws))
    np.testing.assert_allclose(out, references_images.color_jitter(image, *map(float, draws)), atol=3e-5)
    assert out.min() >= -1e-5
    assert out.max() <= 1 + 1e-5


def test_saturation_works_and_keeps_grey_grey() -> None:
    zero = jnp.zeros(())
    image = np.array([[[0.8, 0.4, 0.2], [0.3, 0.3, 0.3]]], np.float32)
    np.testing.assert_allclose(color_jitter(image, zero, zero, jnp.float32(-1.0)), [[[0.8] * 3, [0.3] * 3]], atol=1e-6)
    np.testing.assert_allclose(color_jitter(image, zero, zero, zero), image, atol=1e-6)
    stronger = color_jitter(image, zero, zero, jnp.float32(1 / 3))
    np.testing.assert_allclose(stronger, [[[0.8, 0.8 / 3, 0.0], [0.3] * 3]], atol=1e-6)


def batch(
    samples: int = 3, size: int = 20, cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb")
) -> dict[str, np.ndarray]:
    """The same picture for every sample and camera, so that any difference comes from the draws."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    picture = np.stack([x, y, (x + y) / 2], axis=-1) * 1.2 - 0.8
    return {name: np.repeat(picture[None], samples, 0).astype(np.float32) for name in cameras}


@functools.partial(jax.jit, static_argnames="config")
def run(images: dict[str, Array], seed: int, config: AugmentConfig) -> dict[str, Array]:
    return augment(images, jax.random.key(seed), config)


def test_augment_is_deterministic_and_differs_between_samples_and_keys() -> None:
    images = batch()
    first, again, other = run(images, 0, AugmentConfig()), run(images, 0, AugmentConfig()), run(images, 1, AugmentConfig())
    for name in images:
        np.testing.assert_array_equal(first[name], again[name])
        assert first[name].dtype == jnp.float32
        assert first[name].shape == images[name].shape
        assert np.abs(first[name] - other[name]).max() > 0.01
        assert np.abs(first[name][0] - first[name][1]).max() > 0.01
        assert np.abs(first[name]).max() <= 1 + 1e-5


def test_a_sample_keeps_its_draws_when_the_batch_grows() -> None:
    small, large = run(batch(2), 4, AugmentConfig()), run(batch(5), 4, AugmentConfig())
    for name in small:
        np.testing.assert_allclose(small[name], large[name][:2], atol=1e-6)


def test_all_cameras_of_a_sample_get_the_same_colours() -> None:
    colour_only = AugmentConfig(crop=1.0, rotate_degrees=0.0)
    out = run(batch(cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")), 0, colour_only)
    np.testing.assert_array_equal(out["base_0_rgb"], out["left_wrist_0_rgb"])
    np.testing.assert_array_equal(out["base_0_rgb"], out["right_wrist_0_rgb"])


def test_wrist_cameras_keep_their_geometry() -> None:
    images = batch()
    out = run(images, 0, AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0))
    np.testing.assert_allclose(out["left_wrist_0_rgb"], images["left_wrist_0_rgb"], atol=1e-6)
    assert np.abs(out["base_0_rgb"] - images["base_0_rgb"]).max() > 0.01


def test_off_changes_nothing() -> None:
    images = batch()
    out = run(images, 0, OFF)
    for name in images:
        np.testing.assert_array_equal(out[name], images[name])


def test_outside_the_frame_is_black() -> None:
    white = {"base_0_rgb": np.ones((1, 20, 20, 3), np.float32)}
    config = AugmentConfig(crop=1.0, rotate_degrees=45.0, brightness=0.0, contrast=0.0, saturation=0.0)
    corner = np.asarray(run(white, 3, config)["base_0_rgb"])[0]
    assert corner.min() == -1
    assert corner.max() == 1


def test_draws_stay_in_their_ranges() -> None:
    grey = {"base_0_rgb": np.zeros((400, 2, 2, 3), np.float32)}
    config = AugmentConfig(crop=1.0, rotate_degrees=0.0, brightness=0.3, contrast=0.0, saturation=0.0)
    levels = np.asarray(run(grey, 0, config)["base_0_rgb"])[:, 0, 0, 0] / 2 + 0.5
    # V = 0.5 becomes 0.5 (1 + b) below, 0.5 (1 - b) + b above
    assert levels.min() >= 0.35
    assert levels.max() <= 0.65
    assert levels.min() < 0.37
    assert levels.max() > 0.63


# Actions


@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 20))
def test_action_chunk_against_a_loop(length: int, frame: int, horizon: int) -> None:
    actions = np.random.default_rng(0).normal(size=(length, 3)).astype(np.float32)
    if frame >= length:
        with pytest.raises(IndexError, match="frame"):
            action_chunk(actions, frame, horizon)
        return
    chunk, is_pad = action_chunk(actions, frame, horizon)
    for step in range(horizon):
        np.testing.assert_array_equal(chunk[step], actions[min(frame + step, length - 1)])
        assert is_pad[step] == (frame + step >= length)
    assert not is_pad[0]


def test_action_chunk_is_a_copy() -> None:
    actions = np.zeros((4, 2), np.float32)
    action_chunk(actions, 0, 2)[0][:] = 9
    assert not actions.any()


def test_pad_dim() -> None:
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(pad_dim(x, 5), [[1, 1, 1, 0, 0]] * 2)
    assert pad_dim(x, 5).dtype == np.float32
    assert pad_dim(x, 3) is x
    with pytest.raises(ValueError, match="raise action_dim to 3"):
        pad_dim(x, 2)
