"""Demonstrations of the scripted expert in the simulator: first the physics alone, then what the cameras saw of a success."""

import dataclasses
import io
from pathlib import Path
from typing import Any, Final

import numpy as np

from fusevla.arrays import Float
from fusevla.data.annotation_write import episode_annotation
from fusevla.data.lerobot_write import EpisodeFrames, encode_image
from fusevla.evaluate.libero import LiberoEnv
from fusevla.evaluate.libero_expert import Phase, Progress, Scene, act, grip_of, manner, moving
from fusevla.evaluate.libero_plan import PickAndPlace
from fusevla.files import write_whole

__all__ = ["COLUMNS", "FPS", "Demonstration", "Take", "annotation", "demonstrate", "replay"]

COLUMNS: Final = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
"""Camera name -> column of the set."""
FPS: Final = 10
"""As the published sets say, although the controller runs at 20."""
START, THINK = 12, 9
"""Frames of the first thought and of the one after the grasp, as in the published sets."""

REST: Final = 6
"""Frames after the item is let go."""
PATIENCE: Final = 30
"""Steps in which an item that was let go has to fall to where it belongs."""
NOISE: Final = 0.2
"""Standard deviation of what the hand does beside what it is told, as a share of the largest position action."""
NOISE_MEMORY: Final = 0.7


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A success from initial state ``init``: what was done (``executed``), what the expert had meant (``actions``), float64
    [t, 7] each, and the frames that first show the item held and let go."""

    init: int
    executed: Float[np.ndarray, "t 7"]
    actions: Float[np.ndarray, "t 7"]
    grasp: int
    release: int


def demonstrate(env: LiberoEnv, plan: PickAndPlace, init: int, rng: np.random.Generator) -> Demonstration | None:
    """One try; None where it fails.

    The hand does not quite do what it is told, and the action kept is what the expert would do there: so demonstrations show
    how small errors are made good. Replaying the kept actions does not lead to the same states therefore.
    """
    env.reset(init)
    scene, grip = _scene(env, plan), grip_of(plan.item)
    assert grip is not None
    how = manner(plan.relation, grip, scene, _others(env, plan), rng)
    progress, drift = Progress(), np.zeros(3)
    executed, actions, grasp, release = list[np.ndarray](), list[np.ndarray](), 0, 0
    while not release or len(actions) < release + REST:
        if len(actions) >= env.task.max_steps or (progress.phase is Phase.OPEN and progress.steps > PATIENCE):
            return None
        before, (progress, action) = progress.phase, act(progress, scene, how)
        if progress.phase is not before:
            if progress.phase is Phase.LIFT:
                grasp = len(actions)
            elif progress.phase is Phase.RETREAT:
                release = len(actions)
        drift = NOISE_MEMORY * drift + np.sqrt(1 - NOISE_MEMORY**2) * rng.normal(0.0, NOISE, 3)
        actions.append(action)
        executed.append(np.clip(action + _noise(progress.phase) * np.array([*drift, 0, 0, 0, 0]), -1.0, 1.0))
        env.step(executed[-1], look=False)
        scene = _scene(env, plan)
    return Demonstration(init, np.array(executed), np.array(actions), grasp, release)


def _noise(phase: Phase) -> float:
    """Nothing while fingers move, little where it must be exact."""
    return {True: 1.0, False: 0.0}[moving(phase)] * (0.4 if phase in (Phase.DOWN, Phase.LIFT, Phase.LOWER) else 1.0)


def _scene(env: LiberoEnv, plan: PickAndPlace) -> Scene:
    state, poses = np.asarray(env.observation["state"], np.float64), env.poses()
    return Scene(state[:3], state[3:6], poses[plan.item][0], poses[plan.target][0], env.held == plan.item, env.success)


def _others(env: LiberoEnv, plan: PickAndPlace) -> Float[np.ndarray, "n 3"]:
    """Where everything else is that can be moved, but for what the item is put on."""
    found = [position for name, (position, _) in env.poses().items() if name not in (plan.item, plan.target)]
    return np.array(found).reshape(-1, 3)


def replay(env: LiberoEnv, demonstration: Demonstration) -> EpisodeFrames:
    """What the cameras saw before each action (JPEG), the state then, and the action to be learned.

    Raises:
        RuntimeError: the same actions did not lead to success again.
    """
    seen = [env.reset(demonstration.init)]
    views = {column: [encode_image(seen[0][camera], "jpeg")] for camera, column in COLUMNS.items()}
    for action in demonstration.executed[:-1]:
        env.step(action)
        seen.append({"state": env.observation["state"]})
        for camera, column in COLUMNS.items():
            views[column].append(encode_image(env.observation[camera], "jpeg"))
    if not env.success:
        raise RuntimeError(f"libero: initial state {demonstration.init} of {env.task.language!r} went another way when replayed")
    state = np.stack([observation["state"] for observation in seen])
    return EpisodeFrames(env.task.language, views, state, demonstration.actions.astype(np.float32))


def annotation(plan: PickAndPlace, take: "Take") -> dict[str, Any]:
    """The take's record in ``cot_simple.json``."""
    length, middle = len(take.frames.actions), (take.grasp, take.grasp + THINK)
    return episode_annotation(take.frames.task, plan.plans, [(0, START), middle, (take.release, -1)], length)


@dataclasses.dataclass(frozen=True)
class Take:
    """A demonstration as it is kept until the set is written: its frames, and those that first show the item held and let go."""

    frames: EpisodeFrames
    grasp: int
    release: int

    def save(self, path: Path) -> None:
        """Writes an npz archive, whole or not at all."""
        frames, buffer = self.frames, io.BytesIO()
        images: dict[str, Any] = {}
        for column, views in frames.images.items():
            images[f"{column}_bytes"] = np.frombuffer(b"".join(map(bytes, views)), np.uint8)
            images[f"{column}_sizes"] = np.array([len(view) for view in views])
        marks = np.array([self.grasp, self.release])
        np.savez(buffer, task=np.array(frames.task), state=frames.state, actions=frames.actions, marks=marks, **images)
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Take":
        """Reads it back."""
        with np.load(path) as kept:
            images = {}
            for column in COLUMNS.values():
                whole, ends = kept[f"{column}_bytes"].tobytes(), np.cumsum(kept[f"{column}_sizes"])
                images[column] = [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            grasp, release = map(int, kept["marks"])
            return cls(EpisodeFrames(str(kept["task"]), images, kept["state"], kept["actions"]), grasp, release)
