"""Naive twins of the image transforms: loops over pixels, no library resampling."""

import colorsys
import math

import numpy as np


def crop_rotate(image: np.ndarray, center: np.ndarray, angle: float, crop_size: tuple[int, int]) -> np.ndarray:
    """Reads every output pixel at its place in the input; neighbours outside the image are black."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, x = i - (height - 1) / 2, j - (width - 1) / 2
            row = (math.cos(angle) * y + math.sin(angle) * x) * crop_size[0] / height + center[0] + (height - 1) / 2
            column = (-math.sin(angle) * y + math.cos(angle) * x) * crop_size[1] / width + center[1] + (width - 1) / 2
            top, left = math.floor(row), math.floor(column)
            for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= r < height and 0 <= c < width:
                    out[i, j] += (1 - abs(row - r)) * (1 - abs(column - c)) * image[r, c]
    return out


def color_jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Through HSV, pixel by pixel."""
    out = np.zeros_like(image)
    for i, j in np.ndindex(*image.shape[:2]):
        hue, s, v = colorsys.rgb_to_hsv(*image[i, j].tolist())
        v = v * (1 + brightness) if brightness < 0 else v * (1 - brightness) + brightness
        slope = math.tan((contrast + 1) * math.pi / 4)
        if contrast != 0:
            low = (slope - slope**2) / (2 * (1 - slope**2))
            if v < low:
                v = v / slope
            elif v > 1 - low:
                v = v / slope + 1 - 1 / slope
            else:
                v = slope * (v - 0.5) + 0.5
        out[i, j] = colorsys.hsv_to_rgb(hue, min(s * (1 + saturation), 1.0), v)
    return out
