"""A scripted expert for LIBERO's pick-and-place tasks, which sees where everything is; its demonstrations teach those who do not.

``act`` is a pure function of what was done so far (``Progress``), what is seen (``Scene``) and how it is to be done
(``Manner``): the simulator is nowhere in it. Positions are in metres in the world's frame, z up.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from fusevla.arrays import Float

__all__ = ["Grip", "Manner", "Phase", "Progress", "Scene", "act", "grip_of", "manner", "moving"]

STEP: Final = 0.05
"""Metres that the controller is told to go by an action of 1."""
GAIN: Final = 1.3
"""How much further it is told to go than is left, as it never quite arrives."""
TURN: Final = 0.5
"""Radians, likewise."""
HAND: Final = np.array([0.06, 0.13])
"""Half of the hand's length along x and y, and half of that of a small object."""
ROOM: Final = 0.03
"""Metres between hand and objects beyond which more are of no use."""
CLOSE_STEPS, OPEN_STEPS, LOST_STEPS, STUCK_STEPS = 9, 5, 3, 70
"""How long fingers take to hold and to let go, how long nothing may be held before it counts as dropped, and how long a phase
may take before the next one is tried all the same."""


class Phase(enum.Enum):
    """What is being done, in this order; after a failure from ``ABOVE`` again."""

    ABOVE = enum.auto()
    DOWN = enum.auto()
    CLOSE = enum.auto()
    LIFT = enum.auto()
    CARRY = enum.auto()
    LOWER = enum.auto()
    OPEN = enum.auto()
    RETREAT = enum.auto()


_HOLDING: Final = (Phase.LIFT, Phase.CARRY, Phase.LOWER)
_NEXT: Final = dict(zip(list(Phase), [*list(Phase)[1:], Phase.RETREAT], strict=True))


@dataclasses.dataclass(frozen=True)
class Grip:
    """Where the fingers, which close along y, take an object: so much above its origin, and so far from it along y (a rim, on
    the side where no cabinet stands); with ``slack`` so far from the middle along x, if something is in the way."""

    height: float
    rim: float = 0.0
    slack: float = 0.0


_GRIPS: Final[Mapping[str, Grip]] = {
    "alphabet_soup": Grip(0.005),
    "tomato_sauce": Grip(0.01),
    "salad_dressing": Grip(0.045),
    "ketchup": Grip(0.045),
    "bbq_sauce": Grip(0.02),
    "milk": Grip(0.048),
    "orange_juice": Grip(0.048),
    "cream_cheese": Grip(0.004, slack=0.02),
    "butter": Grip(0.004, slack=0.02),
    "chocolate_pudding": Grip(0.004, slack=0.02),
    "akita_black_bowl": Grip(0.04, rim=0.048),
}


def grip_of(name: str) -> Grip | None:
    """How the object of that name in the simulator is taken; None for those that the expert has not learned to."""
    return _GRIPS.get(re.sub(r"_\d+$", "", name))


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the expert sees: position [3] and axis-angle [3] of the hand, positions [3] of item and target; whether the item is
    held, and whether the task is done."""

    hand: Float[np.ndarray, "3"]
    turned: Float[np.ndarray, "3"]
    item: Float[np.ndarray, "3"]
    target: Float[np.ndarray, "3"]
    held: bool
    done: bool


@dataclasses.dataclass(frozen=True)
class Manner:
    """How one demonstration is done: from the item to where it is gripped, where over the target it is let go, heights of
    the hand, and the largest position action."""

    grip: Float[np.ndarray, "3"]
    place: Float[np.ndarray, "2"]
    travel: float
    hover: float
    carry: float
    release: float
    speed: float


def manner(relation: str, grip: Grip, scene: Scene, others: Float[np.ndarray, "n 3"], rng: np.random.Generator) -> Manner:
    """A way to do it from this scene on; another generator, another way.

    Args:
        relation: Between item and target: in, on.
        grip: Of the item.
        scene: At the beginning.
        others: Positions of what the hand should not bump into.
        rng: Draws what differs between demonstrations: less than the fingers forgive.
    """
    along, across, high, fast = rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0, 2), rng.uniform(-1.0, 1.0, 2), rng.uniform()
    base = scene.target[2]
    return Manner(
        grip=_spot(grip, scene.item, others) + np.array([0.004 * along, 0.0, grip.height]),
        place=(0.012 if relation == "in" else 0.004) * across,
        travel=max(scene.item[2], base) + 0.17 + 0.015 * high[0],
        hover=0.07,
        carry=max(scene.item[2] + 0.1, base + (0.19 if relation == "in" else 0.12) + grip.height) + 0.012 * high[1],
        release=base + 0.15 if relation == "in" else base + grip.height + 0.012,
        speed=0.85 + 0.15 * fast,
    )


def _spot(grip: Grip, item: Float[np.ndarray, "3"], others: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "3"]:
    """From the item's origin to where it is taken, in the plane: the first place with room for the hand, or that with most."""
    spots = [np.array([along * grip.slack, grip.rim, 0.0]) for along in ((0.0, 1.0, -1.0) if grip.slack else (0.0,))]
    gaps = [(np.abs(others - item - spot)[:, :2] - HAND).max(axis=1, initial=-1.0).min(initial=ROOM) for spot in spots]
    return spots[int(np.argmax(gaps))]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The phase, for how many steps it has been so, and for how many nothing was held that should be."""

    phase: Phase = Phase.ABOVE
    steps: int = 0
    lost: int = 0


def act(progress: Progress, scene: Scene, how: Manner) -> tuple[Progress, Float[np.ndarray, "7"]]:
    """The next action and what has been done by then: 3 of position, 3 of rotation, gripper (-1 open, 1 closed), in [-1, 1]."""
    now = _phase(progress, scene, how)
    goal = _goal(now.phase, scene, how)
    limit = how.speed * (0.6 if now.phase in (Phase.DOWN, Phase.LOWER) else 1.0)
    move = np.clip(GAIN * (goal - scene.hand) / STEP, -limit, limit) if moving(now.phase) else np.zeros(3)
    turn = np.clip(_upright(scene.turned) / TURN, -0.5, 0.5)
    closed = now.phase in (Phase.CLOSE, *_HOLDING)
    return now, np.array([*move, *turn, 1.0 if closed else -1.0])


def moving(phase: Phase) -> bool:
    """The hand goes somewhere in it."""
    return phase not in (Phase.CLOSE, Phase.OPEN)


def _phase(before: Progress, scene: Scene, how: Manner) -> Progress:
    """What is to be done now."""
    lost = before.lost + 1 if before.phase in _HOLDING and not scene.held else 0
    if lost > LOST_STEPS or (before.phase is Phase.CLOSE and before.steps > CLOSE_STEPS + LOST_STEPS and not scene.held):
        return Progress()
    if _finished(before, scene, how) or (moving(before.phase) and before.steps >= STUCK_STEPS):
        return Progress(_NEXT[before.phase], 1)
    return Progress(before.phase, before.steps + 1, lost)


def _finished(before: Progress, scene: Scene, how: Manner) -> bool:
    """The phase has reached what it is for."""
    off = _goal(before.phase, scene, how) - scene.hand
    aside, away = float(np.linalg.norm(off[:2])), abs(float(off[2]))
    match before.phase:
        case Phase.ABOVE:
            return aside < 0.018
        case Phase.DOWN:
            return aside < 0.01 and away < 0.006
        case Phase.CLOSE:
            return before.steps >= CLOSE_STEPS and scene.held
        case Phase.LIFT:
            return away < 0.03
        case Phase.CARRY:
            return aside < 0.02
        case Phase.LOWER:
            return away < 0.012
        case Phase.OPEN:
            return before.steps >= OPEN_STEPS and scene.done and not scene.held
        case Phase.RETREAT:
            return False


def _goal(phase: Phase, scene: Scene, how: Manner) -> Float[np.ndarray, "3"]:
    """Where the hand should be."""
    grip = scene.item + how.grip
    if phase is Phase.ABOVE:  # high until it is near, so that nothing on the way is touched
        near = np.clip((np.linalg.norm(grip[:2] - scene.hand[:2]) - 0.04) / 0.08, 0.0, 1.0)
        hover = grip[2] + how.hover
        return np.array([*grip[:2], hover + near * max(0.0, how.travel - hover)])
    if phase in (Phase.DOWN, Phase.CLOSE):
        return grip
    if phase is Phase.LIFT:
        return np.array([*scene.hand[:2], how.carry])
    place = scene.target[:2] + how.place + (scene.hand - scene.item)[:2]
    if phase is Phase.CARRY:
        return np.array([*place, how.carry])
    if phase is Phase.LOWER:
        return np.array([*place, how.release])
    return np.array([*scene.hand[:2], how.release + 0.04])


def _upright(turned: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """The rotation vector [rad] from an orientation to that of a hand which points straight down, its fingers along y."""
    angle = float(np.linalg.norm(turned))
    x, y, z = turned / max(angle, 1e-9) * np.sin(angle / 2)
    vector, scalar = np.array([np.cos(angle / 2), z, -y]), x  # (1, 0, 0; 0) times the conjugate of (x, y, z; w)
    if scalar < 0:
        vector, scalar = -vector, -scalar
    sine = float(np.linalg.norm(vector))
    return vector * (2 * np.arctan2(sine, scalar) / max(sine, 1e-9))
