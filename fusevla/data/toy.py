"""The toy tasks: a scripted expert in the tabletop world, and its demonstrations as a LeRobot v2.1 set.

Two sets exist. The *plans* set is what the ``toy`` preset fine-tunes on: the instruction names two of three blocks and at
most a relation, the plan (``cot_simple.json``) puts them in order, and only its last line says which block is next. Beside
the demonstrations it has short vision-language episodes, which are only thought about: a plan has one token that says which
block comes first, and a demonstration has few frames in which it is written. The *base* set is what the toy base
checkpoint has seen: one sub-goal per episode, named by the instruction, no plan anywhere.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fusevla.arrays import Float
from fusevla.data.annotation_write import episode_annotation
from fusevla.data.lerobot import EpisodeFrames, write_lerobot_v21
from fusevla.data.normalize import NormStats, save_norm_stats
from fusevla.data.toy_world import MAX_STEP, REACH, TABLE, World, draw, over_tray, random_world, state, step

Kind = Literal["plans", "looks", "base"]

RELATIONS: Final[dict[str, tuple[str, Float[np.ndarray, "2"], float]]] = {
    "left": (" from left to right", np.array([1.0, 0.0]), 0.3),
    "top": (" from top to bottom", np.array([0.0, 1.0]), 0.45),
    "open": ("", np.array([1.0, 0.0]), 0.25),
}
"""What the instruction adds, the direction along which blocks are taken, and the share of the tasks. Where the instruction
leaves the order open, the demonstrations have a habit (left first) that the policy has to pick up from them."""

MARGIN: Final = 1.5
"""Two blocks to be ordered differ by at least this much along the direction, in cells: two columns or rows, so that nobody
would argue about the order."""
FPS: Final = 10
COLUMNS: Final = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
"""Camera name -> column of the set."""
ACTUATOR_NOISE: Final = 0.04
"""Standard deviation of what the gripper does beside what it is told while demonstrations are collected, in cells."""
LOOK_FRAMES: Final = 2
"""Frames of a vision-language episode."""
_CLOSE_AT = 0.2
_MAX_FRAMES = 120


@dataclasses.dataclass(frozen=True)
class Episode:
    """A demonstration: ``worlds[t]`` is seen and ``actions[t]`` is done, frame by frame.

    ``plan`` lists block indices in the order wanted (one for the base set), ``placed_at`` the frame that first shows each
    of them in the tray, ``opened_at`` the first frame at which the gripper is open before each of them.
    """

    task: str
    worlds: tuple[World, ...]
    actions: Float[np.ndarray, "t 3"]
    plan: tuple[int, ...] = ()
    opened_at: tuple[int, ...] = ()
    placed_at: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.worlds)


def subgoal(color: str) -> str:
    """What a plan line and a base instruction say."""
    return f"put the {color} block in the tray"


def expert(world: World, target: int) -> Float[np.ndarray, "3"]:
    """The action that brings block ``target`` into the tray: open, go there at full speed, close, go to the tray, open.

    Whatever else is in the gripper is put down first. With the target in the tray the gripper opens and waits.
    """
    wait_open = np.array([0.0, 0.0, -1.0])
    if target in world.placed or world.held not in (None, target):
        return wait_open
    if world.held == target:
        to_tray = world.tray - world.gripper
        arrived = np.linalg.norm(to_tray) < _CLOSE_AT and over_tray(world)
        return wait_open if arrived else _move(to_tray, 1.0)
    if world.opening < 1.0:
        return wait_open
    to_block = world.blocks[target] - world.gripper
    return np.array([0.0, 0.0, 1.0]) if np.linalg.norm(to_block) < _CLOSE_AT else _move(to_block, -1.0)


def _move(offset: np.ndarray, grip: float) -> np.ndarray:
    distance = float(np.linalg.norm(offset))
    return np.array([*(offset * min(1.0, MAX_STEP / max(distance, 1e-9))), grip])


def succeeded(world: World, plan: tuple[int, ...]) -> bool:
    """Exactly the blocks of the plan are in the tray, in its order."""
    return world.placed == plan


def plan_world(rng: np.random.Generator) -> tuple[str, World, tuple[int, ...]]:
    """An unseen task: (instruction, table with three blocks, the two to be placed in order). Only the image has the order."""
    relations = list(RELATIONS.values())
    phrase, direction, _ = relations[rng.choice(len(relations), p=[share for *_, share in relations])]
    while True:
        world = random_world(rng)
        named = rng.permutation(len(world.colors))[:2]
        along = world.blocks[named] @ direction
        if abs(along[0] - along[1]) >= MARGIN:
            break
    first, second = (world.colors[i] for i in named)
    task = f"put the {first} block and the {second} block in the tray{phrase}"
    return task, world, tuple(int(named[i]) for i in np.argsort(along))


def plan_episode(rng: np.random.Generator) -> Episode:
    """A demonstration with a plan. It starts with a closed gripper that opens: that is when the first thought is due."""
    task, world, plan = plan_world(rng)
    worlds, actions = [world], list[np.ndarray]()
    opened_at, placed_at = list[int](), list[int]()
    for target in plan:
        while target not in worlds[-1].placed:
            if worlds[-1].opening == 1.0 and len(opened_at) == len(placed_at):
                opened_at.append(len(worlds) - 1)
            _advance(rng, worlds, actions, target)
        placed_at.append(len(worlds) - 1)
    actions.append(expert(worlds[-1], plan[-1]))
    return Episode(task, tuple(worlds), np.array(actions, np.float32), plan, tuple(opened_at), tuple(placed_at))


def _advance(rng: np.random.Generator, worlds: list[World], actions: list[np.ndarray], target: int) -> None:
    """Appends the expert's action and the frame after it; the gripper does not quite do what it is told."""
    actions.append(expert(worlds[-1], target))
    noise = np.array([*rng.normal(0.0, ACTUATOR_NOISE, 2), 0.0]) * bool(actions[-1][:2].any())
    worlds.append(step(worlds[-1], actions[-1] + noise))
    if len(worlds) > _MAX_FRAMES:
        raise RuntimeError(
            f"toy expert: expected to finish within {_MAX_FRAMES} frames, did not; world {worlds[0]}, target {target}"
        )


def look_episode(rng: np.random.Generator) -> Episode:
    """A table to think about: the gripper wanders over it, open or opening, and touches nothing."""
    task, world, plan = plan_world(rng)
    worlds, actions = [dataclasses.replace(world, opening=float(rng.choice([0.0, 1.0])))], list[np.ndarray]()
    while len(actions) < LOOK_FRAMES:
        direction = rng.uniform(0.0, 2 * np.pi)
        actions.append(np.array([MAX_STEP * np.cos(direction), MAX_STEP * np.sin(direction), -1.0]))
        worlds.append(step(worlds[-1], actions[-1]))
    return Episode(task, tuple(worlds[:-1]), np.array(actions, np.float32), plan)


def base_episode(rng: np.random.Generator) -> Episode:
    """A demonstration of one named sub-goal from anywhere: any opening, any block held, others in the tray already."""
    world, target = base_world(rng)
    task = subgoal(world.colors[target])
    others = [color for i, color in enumerate(world.colors) if i != target]
    if others and rng.random() < 0.5:
        other = str(rng.choice(others))
        task = f"leave the {other} block and {task}" if rng.random() < 0.5 else f"{task} and leave the {other} block"
    worlds, actions = [world], list[np.ndarray]()
    while target not in worlds[-1].placed or worlds[-1].opening < 1.0:
        _advance(rng, worlds, actions, target)
    actions.append(expert(worlds[-1], target))
    placed_at = next(t for t, seen in enumerate(worlds) if target in seen.placed)
    return Episode(task, tuple(worlds), np.array(actions, np.float32), (target,), placed_at=(placed_at,))


def base_world(rng: np.random.Generator) -> tuple[World, int]:
    """A table in the middle of something, and the block to be placed."""
    opening = float(rng.choice([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], p=[0.04, 0.02, 0.02, 0.02, 0.02, 0.88]))
    world = random_world(rng, num_blocks=int(rng.choice([1, 2, 3, 4], p=[0.3, 0.25, 0.3, 0.15])), opening=opening)
    target = int(rng.integers(len(world.colors)))
    for other in range(len(world.colors)):
        if other != target and rng.random() < 0.15:
            world = _put_in_tray(world, other)
    free = [i for i in range(len(world.colors)) if i not in world.placed]
    held = {0: target, 1: int(rng.choice(free))}.get(int(rng.integers(8)))
    crowded = np.linalg.norm(world.blocks - world.gripper, axis=-1).min() < 2 * REACH
    if held is not None and (held == target or not crowded):  # a wrong block put down on another could not be told from it
        blocks = world.blocks.copy()
        blocks[held] = world.gripper
        world = dataclasses.replace(world, held=held, opening=0.0, blocks=blocks)
    return world, target


def _put_in_tray(world: World, block: int) -> World:
    """The same table after somebody moved one block."""
    above = dataclasses.replace(world, gripper=world.tray, held=block)
    return dataclasses.replace(step(above, np.array([0.0, 0.0, -1.0])), gripper=world.gripper, opening=world.opening)


def frames(episode: Episode) -> EpisodeFrames:
    """The episode as it is stored: both cameras, state and actions of every frame."""
    views = [draw(world) for world in episode.worlds]
    images = {column: np.stack([view[camera] for view in views]) for camera, column in COLUMNS.items()}
    return EpisodeFrames(episode.task, images, np.stack([state(world) for world in episode.worlds]), episode.actions)


def annotation(episode: Episode) -> dict[str, Any]:
    """The episode's record in ``cot_simple.json``: think while the gripper opens, act in between, think at the end.

    Where nothing is done (a vision-language episode) the first thought is due all the time.
    """
    plans = [subgoal(episode.worlds[0].colors[block]) for block in episode.plan]
    thinks = list(zip((0, *episode.placed_at), (*episode.opened_at, -1), strict=True))
    return episode_annotation(episode.task, plans, thinks, len(episode))


def episodes(kind: Kind, count: int, seed: int) -> Iterator[Episode]:
    """``count`` episodes; each has a random stream of its own, so episode i is the same whatever the count."""
    make = {"plans": plan_episode, "looks": look_episode, "base": base_episode}[kind]
    stream = (1,) if kind == "looks" else ()  # of their own: they lie beside demonstrations of the same seed
    return (make(np.random.default_rng((seed, index, *stream))) for index in range(count))


def norm_stats() -> dict[str, NormStats]:
    """What state and actions are normalised with: the world's own ranges, so that base and fine-tuning share them."""
    state_range = (np.zeros(3), np.array([TABLE, TABLE, 1.0]))
    actions_high = np.array([MAX_STEP, MAX_STEP, 1.0])
    ranges = {"state": state_range, "actions": (-actions_high, actions_high)}
    return {key: NormStats((low + high) / 2, (high - low) / 2, low, high) for key, (low, high) in ranges.items()}


def write_toy_set(
    root: str | os.PathLike[str], kind: Literal["plans", "base"] = "plans", count: int = 700, looks: int = 6_000, seed: int = 0
) -> Path:
    """Writes a toy set as a LeRobot v2.1 folder with norm_stats.json; returns the folder.

    With plans it has cot_simple.json, and ``looks`` vision-language episodes after the others. The folder appears when it
    is complete. Raises ``FileExistsError`` where ``root`` exists already and is not empty.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists already; a set is only ever written to a new folder. Delete it or choose another.")
    stream = list(episodes(kind, count, seed))
    if kind == "plans":
        stream += episodes("looks", looks, seed)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        made = write_lerobot_v21(Path(scratch) / "set", map(frames, stream), fps=FPS, robot_type="toy")
        save_norm_stats(made, norm_stats())
        if kind == "plans":
            (made / "cot_simple.json").write_text(json.dumps(annotations(stream)), encoding="utf-8")
        made.replace(root)
    return root


def annotations(stream: Sequence[Episode]) -> dict[str, Any]:
    """``cot_simple.json`` of episodes with plans; those in which nothing is done are its vision-language episodes."""
    records = {str(i): annotation(episode) for i, episode in enumerate(stream)}
    return records | {"vision_language_episode_idx": [i for i, episode in enumerate(stream) if not episode.placed_at]}
