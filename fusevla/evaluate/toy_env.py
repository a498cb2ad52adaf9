"""The embedded tabletop as a Gymnasium environment: one plan of the toy set per episode, on a table nobody has seen."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fusevla.arrays import Float, UInt8
from fusevla.data.toy import plan_world, subgoal, succeeded
from fusevla.data.toy_world import IMAGE_SIZE, TABLE, World, draw, state, step

__all__ = ["MAX_STEPS", "ToyEnv"]

MAX_STEPS = 120
"""Four times what the expert needs."""


class ToyEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """Observation: both cameras (uint8 [60, 60, 3]) and ``state`` (float32 [3]); action: float32 [3] as in ``toy_world``.

    An episode ends when the plan is done (reward 1), when it cannot be done any more, or after ``MAX_STEPS`` (truncated).
    ``info`` has the ``task`` that the robot is told; the rest of it (``plans``, ``placed``, ``held``) only judges may see.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own declaration)
    render_mode = "rgb_array"

    def __init__(self) -> None:
        image = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        felt = spaces.Box(np.zeros(3, np.float32), np.array([TABLE, TABLE, 1.0], np.float32))
        self.observation_space = spaces.Dict(  # type: ignore[assignment]
            {"base_0_rgb": image, "left_wrist_0_rgb": image, "state": felt}
        )
        self.action_space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A new table; the same one for the same ``seed``."""
        super().reset(seed=seed, options=options)
        self._task, self._world, self._plan = plan_world(self.np_random)
        self._steps = 0
        return self._observation(), self._info()

    def step(self, action: Float[np.ndarray, "3"]) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One action. ValueError where it is not three finite numbers."""
        action = np.asarray(action, np.float64)
        if action.shape != (3,) or not np.isfinite(action).all():
            raise ValueError(f"toy: an action of 3 finite numbers expected, got {action}")
        self._world, self._steps = step(self._world, action), self._steps + 1
        done = succeeded(self._world, self._plan)
        hopeless = self._world.placed != self._plan[: len(self._world.placed)]
        return self._observation(), float(done), done or hopeless, self._steps >= MAX_STEPS, self._info()

    def render(self) -> UInt8[np.ndarray, "60 120 3"]:  # type: ignore[override]
        """Both cameras side by side."""
        return np.concatenate(list(draw(self._world).values()), axis=1)

    def _observation(self) -> dict[str, np.ndarray]:
        return {**draw(self._world), "state": state(self._world)}

    def _info(self) -> dict[str, Any]:
        world: World = self._world
        return {
            "task": self._task,
            "colors": world.colors,
            "plans": tuple(subgoal(world.colors[i]) for i in self._plan),
            "placed": len(world.placed),
            "held": None if world.held is None else world.colors[world.held],
        }
