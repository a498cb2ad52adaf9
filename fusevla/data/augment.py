"""Image transforms on the device: resize with padding, and train-time augmentation with one key per sample.

Geometry: one bilinear resampling composed of crop, resize and rotation, as in openpi ``models/model.py``@15a9616a
(``preprocess_observation``, through augmax). Colour: brightness, contrast and saturation as intended there; augmax 0.4.1
leaves saturation alone, shifts the hue and skips half of the images.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Array, Float, Int, Key, UInt8
from fusevla.data.transforms import padded_box
from fusevla.presets import AugmentConfig

__all__ = ["augment", "color_jitter", "crop_rotate", "resize_with_pad_jax"]


def resize_with_pad_jax(
    images: UInt8[Array, "*batch h w 3"] | Float[Array, "*batch h w 3"], height: int, width: int
) -> UInt8[Array, "*batch height width 3"] | Float[Array, "*batch height width 3"]:
    """Antialiased linear resize that keeps the aspect; pads with 0 (uint8) or -1 (float in [-1, 1], which is clipped)."""
    top, left, inner_height, inner_width = padded_box(images.shape[-3], images.shape[-2], height, width)
    shape = (*images.shape[:-3], inner_height, inner_width, 3)
    resized = jax.image.resize(jnp.asarray(images, jnp.float32), shape, "linear", antialias=True)
    if images.dtype == jnp.uint8:
        resized, fill = jnp.round(resized).clip(0, 255).astype(jnp.uint8), 0
    else:
        resized, fill = resized.clip(-1.0, 1.0).astype(images.dtype), -1
    bottom, right = height - inner_height - top, width - inner_width - left
    padding = [(0, 0)] * (resized.ndim - 3) + [(top, bottom), (left, right), (0, 0)]
    return jnp.pad(resized, padding, constant_values=fill)


def augment(
    images: Mapping[str, Float[Array, "b h w 3"]], key: Key, config: AugmentConfig, positions: Int[Array, " b"] | None = None
) -> dict[str, Float[Array, "b h w 3"]]:
    """Augment a batch of float32 images in [-1, 1]; cameras with ``wrist`` in their name keep their geometry.

    Every sample has its own key, derived from ``key`` and its position (of those in a part of a batch: ``positions`` in the
    whole); all cameras of a sample share the draws, so that one scene stays one scene. Outside the frame there is black.
    """
    if positions is None:
        positions = jnp.arange(next(iter(images.values())).shape[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(positions))
    one = functools.partial(_augment_one, config=config)
    return {name: jax.vmap(functools.partial(one, geometry="wrist" not in name))(x, keys) for name, x in images.items()}


def _augment_one(image: Float[Array, "h w 3"], key: Key, config: AugmentConfig, geometry: bool) -> Float[Array, "h w 3"]:
    geometry_key, color_key = jax.random.split(key)
    geometry = geometry and (config.crop < 1 or config.rotate_degrees > 0)
    color = any((config.brightness, config.contrast, config.saturation))
    if not geometry and not color:
        return image
    image = image / 2 + 0.5
    if geometry:
        image = _random_crop_rotate(image, geometry_key, config)
    if color:
        image = _random_color(image, color_key, config)
    return image * 2 - 1


def _random_crop_rotate(image: Float[Array, "h w 3"], key: Key, config: AugmentConfig) -> Float[Array, "h w 3"]:
    center_key, angle_key = jax.random.split(key)
    height, width = image.shape[:2]
    crop_height, crop_width = int(config.crop * height), int(config.crop * width)
    reach = np.array([height - crop_height, width - crop_width], np.float32) / 2
    center = jax.random.uniform(center_key, (2,), minval=-1.0, maxval=1.0) * reach
    limit = math.radians(config.rotate_degrees)
    angle = jax.random.uniform(angle_key, (), minval=-limit, maxval=limit)
    return crop_rotate(image, center, angle, (crop_height, crop_width))


def _random_color(image: Float[Array, "h w 3"], key: Key, config: AugmentConfig) -> Float[Array, "h w 3"]:
    limits = (config.brightness, config.contrast, config.saturation)
    keys = jax.random.split(key, 3)
    draws = [jax.random.uniform(keys[i], (), minval=-limit, maxval=limit) for i, limit in enumerate(limits)]
    return color_jitter(image, *draws)


def crop_rotate(
    image: Float[Array, "h w 3"], center: Float[Array, " 2"], angle: Float[Array, ""], crop_size: tuple[int, int]
) -> Float[Array, "h w 3"]:
    """Crop ``crop_size`` around the image's centre moved by ``center`` (y, x pixels), scale back, rotate by ``angle`` rad.

    One bilinear resampling: output pixel p (from the centre) is read at ``center + crop/size * R(angle) p``.
    """
    height, width = image.shape[:2]
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = (np.arange(height, dtype=np.float32) - middle_y)[:, None], (np.arange(width, dtype=np.float32) - middle_x)[None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows = (cos * y + sin * x) * (crop_size[0] / height) + (center[0] + middle_y)
    columns = (cos * x - sin * y) * (crop_size[1] / width) + (center[1] + middle_x)
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, [rows, columns], order=1, mode="constant", cval=0.0),
        in_axes=-1,
        out_axes=-1,
    )(image)


def color_jitter(
    image: Float[Array, "h w 3"], brightness: Float[Array, ""], contrast: Float[Array, ""], saturation: Float[Array, ""]
) -> Float[Array, "h w 3"]:
    """Change the value and the saturation of every pixel (its hue stays); image in [0, 1], each amount in (-1, 1), 0 is none.

    The value V = max(r, g, b) is blended towards white (brightness > 0) or black, then bent by a piecewise linear contrast
    curve of slope ``tan((contrast + 1) pi / 4)`` around one half that keeps 0 and 1; saturation S becomes
    ``S (1 + saturation)``, at most 1.
    """
    value = image.max(axis=-1, keepdims=True)
    darkest = image.min(axis=-1, keepdims=True)
    bright = jnp.where(brightness < 0, value * (1 + brightness), value * (1 - brightness) + brightness)
    new_value = _contrast(bright, contrast)
    scale = jnp.where(value > 0, (value - darkest) / jnp.maximum(value, 1e-6), 0.0)
    new_scale = jnp.clip(scale * (1 + saturation), 0.0, 1.0)
    # 1 - x/V runs from 0 (the brightest channel) to S (the darkest): stretching it changes S and keeps the hue
    deficit = jnp.where(value > 0, 1 - image / jnp.maximum(value, 1e-6), 0.0)
    return new_value * (1 - deficit * new_scale / jnp.maximum(scale, 1e-6))


def _contrast(value: Float[Array, "h w 1"], contrast: Float[Array, ""]) -> Float[Array, "h w 1"]:
    slope = jnp.tan((contrast + 1) * (jnp.pi / 4))
    # (s - s^2) / (2 (1 - s^2)) = s / (2 (1 + s)), without the zero division at s = 1
    low = slope / (2 * (1 + slope))
    middle = slope * (value - 0.5) + 0.5
    return jnp.where(value < low, value / slope, jnp.where(value > 1 - low, value / slope + 1 - 1 / slope, middle))
