"""The embedded tabletop: physics and drawing, NumPy only.

A square table of 5x5 unit cells carries a few coloured blocks and one tray. A gripper moves in the plane, snaps shut on the
block under it and opens slowly. Two cameras see everything: the base camera looks straight down (one cell per vision
patch), the wrist camera is a wide view centred on the gripper, so that a block's place in it is its displacement.

Coordinates are in cells: x grows to the right, y grows downwards (as pixels do), both in [0, 5].
Actions are float[3]: (dx, dy) in cells per step, clipped to ``MAX_STEP`` in length, and a grip command (> 0 closes).
"""

import dataclasses
from typing import Final

import numpy as np

from fusevla.arrays import Float, UInt8

TABLE: Final = 5
"""Cells along each side of the table."""
IMAGE_SIZE: Final = 60
"""Pixels along each side of a camera image: 12 per cell for the base camera, 7.5 for the wrist camera."""
MAX_STEP: Final = 0.6
"""Longest move of one step, in cells."""
OPENING: Final = 0.2
"""How far the gripper opens in one step (0 closed, 1 open); it closes at once."""
REACH: Final = 0.4
"""A block whose centre is at most this far away is grasped by closing, in cells."""
TRAY_HALF: Final = 0.5
"""Half the side of the tray: a block released over it falls in."""

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
    "cyan": (0, 255, 255),
}
"""The blocks' colours: corners of the RGB cube. The tray is white, the gripper grey, both tables dark."""

_BACKGROUND = {"base_0_rgb": 70.0, "left_wrist_0_rgb": 0.0}
# Each camera has an exposure of its own: image tokens carry no camera embedding, so the picture must say whose it is. Dark,
# because against a mid-grey complementary colours are opposite vectors, which nothing linear can call "a block".
_GRIPPER = (150, 150, 150)
_BLOCK_HALF = 0.4
_SUNK_HALF = 0.23  # what shows of a block in the tray
_WRIST_SPAN = 8.0
_SLOTS = np.array([(-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)])


@dataclasses.dataclass(frozen=True)
class World:
    """Everything there is on the table at one moment; a value, never changed in place.

    ``colors[i]`` names block i, ``blocks[i]`` is its centre. ``held`` is the block in the gripper or None, ``placed`` the
    blocks in the tray in the order in which they got there.
    """

    gripper: Float[np.ndarray, "2"]
    opening: float
    tray: Float[np.ndarray, "2"]
    colors: tuple[str, ...]
    blocks: Float[np.ndarray, "n 2"]
    held: int | None = None
    placed: tuple[int, ...] = ()


def random_world(
    rng: np.random.Generator, *, num_blocks: int = 3, opening: float = 0.0, jitter: float = 0.1, colors: tuple[str, ...] = ()
) -> World:
    """A table with blocks of distinct colours and a tray, each in a cell of its own.

    Args:
        rng: source of every random choice.
        num_blocks: 1 to 6.
        opening: of the gripper, which starts anywhere and holds nothing.
        jitter: blocks lie at most this far from their cell's centre along each axis.
        colors: the blocks' colours; drawn from ``COLORS`` when empty.
    """
    names = colors or tuple(str(name) for name in rng.permutation(list(COLORS))[:num_blocks])
    cells = rng.permutation(TABLE * TABLE)[: len(names) + 1]
    centres = np.stack([cells % TABLE, cells // TABLE], axis=-1) + 0.5
    blocks = centres[1:] + rng.uniform(-jitter, jitter, (len(names), 2))
    gripper = rng.uniform(0.3, TABLE - 0.3, 2)
    return World(gripper=gripper, opening=opening, tray=centres[0], colors=names, blocks=blocks)


def step(world: World, action: Float[np.ndarray, "3"]) -> World:
    """The world one step later. The gripper moves first, then its fingers do."""
    move = np.asarray(action[:2], np.float64)
    length = float(np.linalg.norm(move))
    gripper = np.clip(world.gripper + move * min(1.0, MAX_STEP / max(length, 1e-9)), 0.0, TABLE)
    blocks = world.blocks.copy()
    if world.held is not None:
        blocks[world.held] = gripper
    moved = dataclasses.replace(world, gripper=gripper, blocks=blocks)
    return _close(moved) if action[2] > 0 else _open(moved)


def _close(world: World) -> World:
    """Snap shut; an open gripper takes the nearest free block within reach."""
    if world.held is not None or world.opening < 0.5:
        return dataclasses.replace(world, opening=0.0)
    distances = np.linalg.norm(world.blocks - world.gripper, axis=-1)
    distances[list(world.placed)] = np.inf
    nearest = int(distances.argmin())
    held = nearest if distances[nearest] <= REACH else None
    blocks = world.blocks.copy()
    if held is not None:
        blocks[held] = world.gripper
    return dataclasses.replace(world, opening=0.0, held=held, blocks=blocks)


def _open(world: World) -> World:
    """Open a little; a held block falls at once, into the next slot of the tray if it is below."""
    opened = dataclasses.replace(world, opening=min(1.0, world.opening + OPENING), held=None)
    if world.held is None or not over_tray(world):
        return opened
    blocks = world.blocks.copy()
    blocks[world.held] = world.tray + _SLOTS[len(world.placed) % len(_SLOTS)]
    return dataclasses.replace(opened, blocks=blocks, placed=(*world.placed, world.held))


def over_tray(world: World) -> bool:
    """Whether a block released now would fall into the tray."""
    return bool(np.abs(world.gripper - world.tray).max() <= TRAY_HALF)


def state(world: World) -> Float[np.ndarray, "3"]:
    """What the robot feels: gripper x, y (cells) and opening (0 to 1), float32."""
    return np.array([*world.gripper, world.opening], np.float32)


def draw(world: World, *, size: int = IMAGE_SIZE) -> dict[str, UInt8[np.ndarray, "size size 3"]]:
    """Both camera images, uint8, keyed by the model's camera names ``base_0_rgb`` and ``left_wrist_0_rgb``."""
    corner = np.zeros(2)
    return {
        "base_0_rgb": _view(world, corner, float(TABLE), size, _BACKGROUND["base_0_rgb"]),
        "left_wrist_0_rgb": _view(world, world.gripper - _WRIST_SPAN / 2, _WRIST_SPAN, size, _BACKGROUND["left_wrist_0_rgb"]),
    }


def _view(world: World, corner: np.ndarray, span: float, size: int, background: float) -> np.ndarray:
    canvas = np.full((size, size, 3), background, np.float32)
    scale = size / span

    def rectangle(centre: np.ndarray, half: tuple[float, float], color: tuple[int, int, int]) -> None:
        low = (centre - corner - half) * scale
        high = (centre - corner + half) * scale
        _paint(canvas, low, high, color)

    rectangle(world.tray, (TRAY_HALF, TRAY_HALF), (255, 255, 255))
    order = [i for i in range(len(world.colors)) if i != world.held] + ([] if world.held is None else [world.held])
    for i in order:
        half = _SUNK_HALF if i in world.placed else _BLOCK_HALF
        rectangle(world.blocks[i], (half, half), COLORS[world.colors[i]])
    gap = 0.3 + 0.2 * world.opening
    for side in (-1.0, 1.0):
        rectangle(world.gripper + np.array([side * gap, 0.0]), (0.08, 0.25), _GRIPPER)
    return np.rint(canvas).astype(np.uint8)


def _paint(canvas: np.ndarray, low: np.ndarray, high: np.ndarray, color: tuple[int, int, int]) -> None:
    """Blend an axis-aligned rectangle (pixel units) in; a pixel's share is the area covered, so motion is smooth."""
    first = [max(int(edge), 0) for edge in np.floor(low)]
    last = [min(int(edge), len(canvas)) for edge in np.ceil(high)]
    if last[0] <= first[0] or last[1] <= first[1]:
        return
    columns = _coverage(first[0], last[0], float(low[0]), float(high[0]))
    rows = _coverage(first[1], last[1], float(low[1]), float(high[1]))
    share = (rows[:, None] * columns[None, :])[..., None]
    window = canvas[first[1] : last[1], first[0] : last[0]]
    window += share * (np.array(color, np.float32) - window)


def _coverage(first: int, last: int, low: float, high: float) -> np.ndarray:
    edges = np.arange(first, last, dtype=np.float32)
    return np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0.0, 1.0)
