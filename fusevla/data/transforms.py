"""Host-side transforms of one sample, NumPy and Pillow only; what runs on the device is in ``augment``."""

import numpy as np
from PIL import Image

from fusevla.arrays import Bool, Float, UInt8

__all__ = ["action_chunk", "pad_dim", "padded_box", "resize_with_pad", "stay_chunk"]


def padded_box(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image scaled into a target with its aspect kept.

    Sizes are truncated and an odd remainder goes to the bottom or right, as in openpi ``shared/image_tools.py``@15a9616a.
    """
    ratio = max(width / target_width, height / target_height)
    inner_height, inner_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    return (target_height - inner_height) // 2, (target_width - inner_width) // 2, inner_height, inner_width


def resize_with_pad(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Bilinear (antialiased) resize that keeps the aspect and pads with black. At most one grey level from the device's.

    Takes an array or an RGB image of Pillow's, which saves two copies.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"An image must be uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}.")
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    top, left, inner_height, inner_width = padded_box(image.height, image.width, height, width)
    resized = np.asarray(image.resize((inner_width, inner_height), Image.Resampling.BILINEAR))
    if resized.shape[:2] == (height, width):
        return resized
    padded = np.zeros((height, width, 3), np.uint8)
    padded[top : top + inner_height, left : left + inner_width] = resized
    return padded


def action_chunk(
    actions: Float[np.ndarray, "t a"], frame: int, horizon: int
) -> tuple[Float[np.ndarray, "horizon a"], Bool[np.ndarray, " horizon"]]:
    """The ``horizon`` actions from ``frame`` on, of one episode's ``actions``, and which of them lie past its end.

    Past the end the last action is repeated. IndexError when ``frame`` is outside the episode.
    """
    if not 0 <= frame < len(actions):
        raise IndexError(f"frame {frame} of an episode with {len(actions)}")
    steps = frame + np.arange(horizon)
    return actions[np.minimum(steps, len(actions) - 1)], steps >= len(actions)


def stay_chunk(last_action: Float[np.ndarray, " a"], horizon: int) -> Float[np.ndarray, "h a"]:
    """Stand still: ``horizon`` actions of zero motion with the last gripper command (the last dimension), not normalised."""
    still = np.zeros_like(last_action)
    still[-1] = last_action[-1]
    return np.tile(still, (horizon, 1))


def pad_dim(x: Float[np.ndarray, "*batch a"], dim: int) -> Float[np.ndarray, "*batch dim"]:
    """Zeros appended on the last axis up to ``dim``. ValueError when there are more dimensions already."""
    missing = dim - x.shape[-1]
    if missing < 0:
        raise ValueError(f"An array {list(x.shape)} does not fit into {dim} dimensions; raise action_dim to {x.shape[-1]}.")
    return np.concatenate([x, np.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1) if missing else x
