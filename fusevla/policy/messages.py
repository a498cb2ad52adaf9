"""What clients and server say to each other, as pure functions: a request becomes a ``Query``, a reply a map.

Keys of a request, as openpi's LIBERO clients send them: ``observation/image``, ``observation/wrist_image``,
``observation/state`` and ``prompt``; further ``reset`` and ``is_warm_up``. Source: DESIGN section 8.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fusevla.arrays import Float, UInt8
from fusevla.data.samples import used_cameras
from fusevla.policy.agent import Agent
from fusevla.policy.policy import Policy, Query, Reply
from fusevla.policy.wire import WireError

__all__ = ["Request", "Session", "Takes", "acted", "metadata", "parse_request", "takes", "thinking"]

KEYS: Final = {"base_0_rgb": "observation/image", "left_wrist_0_rgb": "observation/wrist_image"}
STATE: Final = "observation/state"
MAX_SIDE: Final = 4096
MAX_PROMPT: Final = 1000


@dataclasses.dataclass(frozen=True)
class Takes:
    """What the served policy takes."""

    cameras: tuple[str, ...]
    state_dims: tuple[int, int]
    """At least, at most."""


def takes(policy: Policy) -> Takes:
    """As its preset and statistics say; without statistics a state may have as many dimensions as the model."""
    if policy.stats is None:
        dims = (1, policy.preset.model.action_dim)
    else:
        dims = (len(policy.stats["state"].mean), len(policy.stats["state"].mean))
    return Takes(used_cameras(policy.preset.data), dims)


@dataclasses.dataclass(frozen=True)
class Request:
    """A client's message, checked. Without an observation (``task`` is None) it only resets."""

    task: str | None
    images: Mapping[str, UInt8[np.ndarray, "h w 3"] | None] = dataclasses.field(default_factory=dict)
    state: Float[np.ndarray, " a"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    reset: bool = False
    warm_up: bool = False
    """Answered as any other, from a fresh agent, and then forgotten."""


def parse_request(message: object, policy: Takes) -> Request:
    """Checks a received value.

    A camera that the policy uses must be there; None says that the robot has none (it is masked).

    Raises:
        WireError: with the key, what was expected and what came.
    """
    if not isinstance(message, dict):
        raise WireError(f"request: expected a map, got {type(message).__name__}")
    reset, warm_up = _flag(message, "reset"), _flag(message, "is_warm_up")
    if (reset or warm_up) and not {"prompt", STATE, *KEYS.values()} & message.keys():
        return Request(None, reset=True)
    needed = ["prompt", STATE, *(_key(camera) for camera in policy.cameras)]
    absent = [key for key in needed if key not in message]
    if absent:
        raise WireError(f"request: expected the keys {needed} (None for a camera that the robot has not), missing {absent}")
    images = {camera: _image(message[_key(camera)], _key(camera)) for camera in policy.cameras}
    return Request(_prompt(message["prompt"]), images, _state(message[STATE], policy.state_dims), reset, warm_up)


def _key(camera: str) -> str:
    return KEYS.get(camera, f"observation/{camera}")


def _flag(message: Mapping[Any, Any], key: str) -> bool:
    value = message.get(key, False)
    if not isinstance(value, bool | int | np.bool_ | None):
        raise WireError(f"{key}: expected true or false, got {type(value).__name__}")
    return bool(value)


def _prompt(value: object) -> str:
    text = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_PROMPT:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise WireError(f"prompt: expected a text of 1 to {MAX_PROMPT} characters, got {got}")
    return str(text)


def _image(value: object, key: str) -> UInt8[np.ndarray, "h w 3"] | None:
    """uint8 or float in [0, 1], channels last or first: openpi's server takes the same four."""
    if value is None:
        return None
    expected = f"{key}: expected uint8 [height, width, 3] or float in [0, 1], sides 1 to {MAX_SIDE}"
    if not isinstance(value, np.ndarray) or value.ndim != 3:
        raise WireError(f"{expected}; got {_shown(value)}")
    image = value if value.shape[2] == 3 else np.moveaxis(value, 0, 2)
    if image.shape[2] != 3 or not 1 <= min(image.shape[:2]) <= max(image.shape[:2]) <= MAX_SIDE:
        raise WireError(f"{expected}; got {_shown(value)}")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
        raise WireError(f"{expected}; got {_shown(value)}")
    return np.ascontiguousarray((255 * image).astype(np.uint8))


def _state(value: object, dims: tuple[int, int]) -> Float[np.ndarray, " a"]:
    expected = f"{STATE}: expected {dims[0]}{f' to {dims[1]}' if dims[1] > dims[0] else ''} finite numbers"
    if isinstance(value, list) and all(isinstance(x, int | float | np.generic) for x in value):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 1:
        raise WireError(f"{expected}; got {_shown(value)}")
    with np.errstate(over="ignore"):
        state = value.astype(np.float32)
    if not dims[0] <= len(state) <= dims[1] or not np.isfinite(state).all():
        raise WireError(f"{expected}; got {len(state)}{'' if np.isfinite(state).all() else ', not all finite'}")
    return state


def _shown(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Session:
    """What the server remembers of one connection; never changed in place."""

    seed: tuple[int, ...]
    agent: Agent | None = None
    asked: int = 0
    """Queries so far, over all resets: no two draw the same noise."""

    def query(self, request: Request) -> Query:
        """The first question of a request: to a fresh agent after a reset, a changed prompt or on a new connection."""
        assert request.task is not None
        fresh = self.agent is None or request.reset or request.warm_up or request.task != self.agent.task
        agent = Agent(request.task) if fresh or self.agent is None else self.agent
        return Query(agent, request.images, request.state, (*self.seed, self.asked))

    def after(self, request: Request, reply: Reply) -> "Session":
        """Once the reply is known."""
        return dataclasses.replace(self, agent=None if request.warm_up else reply.agent, asked=self.asked + 1)

    def forgotten(self) -> "Session":
        """After a reset."""
        return dataclasses.replace(self, agent=None)


def metadata(policy: Policy, expose_thinking: bool) -> dict[str, Any]:
    """The map that every connection begins with."""
    preset, wanted = policy.preset, takes(policy)
    dims = preset.model.action_dim if policy.stats is None else len(policy.stats["actions"].mean)
    return {
        "policy": "fusevla",
        "preset": preset.name,
        "observation_keys": ["prompt", STATE, *(_key(camera) for camera in wanted.cameras)],
        "state_dim": wanted.state_dims[1],
        "action_horizon": preset.model.action_horizon,
        "action_dim": dims,
        "expose_thinking": expose_thinking,
    }


def acted(reply: Reply, timing: Mapping[str, float], expose_thinking: bool) -> dict[str, Any]:
    """``actions`` float32 [horizon, dimensions], the latest ``thought`` (empty: none yet), ``server_timing`` in ms."""
    answer = {"actions": reply.actions, "thought": reply.agent.thought or "", "server_timing": dict(timing)}
    return {"isthinking": False, **answer} if expose_thinking else answer


def thinking(reply: Reply, timing: Mapping[str, float]) -> dict[str, Any]:
    """A new thought, where the client asked to see them: it looks and asks again."""
    return {"isthinking": True, "thought": reply.thought or "", "server_timing": dict(timing)}
