"""One task of the LIBERO simulator, as published evaluations run it (DESIGN section 8); needs the extra ``libero``.

hf-libero is imported only inside ``LiberoEnv``: the tasks, the initial states and the state vector are read without it, and
without PyTorch, which its benchmark module would bring.
"""

import dataclasses
import importlib
import importlib.util
import logging
import os
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from fusevla.arrays import Float, UInt8
from fusevla.evaluate.libero_init import read_init_states
from fusevla.files import cache_folder, write_whole

__all__ = ["MAX_STEPS", "LiberoEnv", "Task", "axis_angle", "state_vector", "suite_name", "tasks"]

MAX_STEPS: Final = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Actions of an episode by suite, the settling steps not counted."""

SEED: Final = 7
SETTLING_STEPS: Final = 10
NO_OP: Final = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
CAMERAS: Final = {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}
IMAGE_SIZE: Final = 256
PLACEMENT_TRIES: Final = 10

_INSTALL: Final = "install the extra: pip install 'fusevla[libero]'"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite: what the robot is told, and its two files in the installed package."""

    suite: str
    index: int
    language: str
    bddl_file: Path
    init_file: Path

    @property
    def max_steps(self) -> int:
        """Actions until the episode is given up."""
        return MAX_STEPS[self.suite]


def suite_name(name: str) -> str:
    """The full name of a suite: ``object`` and ``libero_object`` are the same. ValueError where there is none such."""
    full = name if name.startswith("libero_") else f"libero_{name}"
    if full not in MAX_STEPS:
        raise ValueError(f"libero: unknown suite {name!r}; expected one of {', '.join(MAX_STEPS)}")
    return full


def tasks(suite: str) -> list[Task]:
    """The tasks of a suite in the benchmark's own order.

    Raises:
        ValueError: unknown suite.
        ModuleNotFoundError: hf-libero is not installed.
    """
    suite, package = suite_name(suite), _package()
    names = runpy.run_path(str(package / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][suite]
    bddl, init = package / "bddl_files" / suite, package / "init_files" / suite
    return [Task(suite, i, _language(name), bddl / f"{name}.bddl", init / f"{name}.pruned_init") for i, name in enumerate(names)]


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """Axis times angle of an xyzw quaternion. The angle is 2 acos(w), up to 2 pi and not wrapped, as in the training sets."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else quaternion[:3] * (2.0 * np.arccos(w) / sine)


def state_vector(observation: Mapping[str, Any]) -> Float[np.ndarray, "8"]:
    """float32: end-effector position [m], its axis-angle [rad], two finger joints [m], of a robosuite observation."""
    turned = axis_angle(np.asarray(observation["robot0_eef_quat"], np.float64))
    parts = observation["robot0_eef_pos"], turned, observation["robot0_gripper_qpos"]
    return np.concatenate(parts).astype(np.float32)


class LiberoEnv:
    """A task in closed loop; while one is open, no other may be in the same process (they would render each other's scenes).

    ``observation`` holds ``state`` (float32 [8]) and, where the last step was looked at, both cameras (uint8 [256, 256, 3],
    upright). An episode is ``over`` after success or ``task.max_steps`` actions; ``reset`` starts the next one.
    """

    observation: dict[str, np.ndarray]

    def __init__(self, task: Task, *, cameras: bool = True, assets: Path | None = None) -> None:
        """Finds all that is needed.

        Args:
            task: One of ``tasks``.
            cameras: False leaves out rendering altogether.
            assets: The folder of meshes and textures; by default ``assets`` in the package ``libero.libero``.

        Raises:
            ModuleNotFoundError: hf-libero or a package of its simulator is not installed.
            FileNotFoundError: no assets.
            RuntimeError: nothing here can render without a screen.
            ValueError: the task's initial states cannot be read.
        """
        self.task, self.cameras = task, cameras
        self._module = _simulator(assets)
        self._simulator: Any = None
        self.init_states = read_init_states(task.init_file)
        self._look = False
        self.steps, self.success = 0, False

    def reset(self, init: int, seed: int = SEED) -> dict[str, np.ndarray]:
        """Starts from initial state ``init``, lets things settle and looks. The same arguments give the same episode.

        ``seed`` places the fixtures, since initial states hold movable things only; it seeds NumPy's global generator.

        Raises:
            ValueError: there is no such initial state.
        """
        if not 0 <= init < len(self.init_states):
            raise ValueError(f"libero: initial state 0 to {len(self.init_states) - 1} expected, got {init}")
        self._build(seed)
        self._simulator.set_init_state(self.init_states[init])
        self._render_on_demand()
        self.steps, self.success = 0, False
        for left in reversed(range(SETTLING_STEPS)):
            self._advance(np.array(NO_OP), look=left == 0)
        return self.observation

    def step(self, action: Float[np.ndarray, "7"], *, look: bool = True) -> bool:
        """One action: 3 of position, 3 of rotation, gripper (-1 open, 1 closed); says whether the task is done.

        Args:
            action: Beyond [-1, 1] it is cut off.
            look: Render the cameras, by far the slowest part; not needed between the actions of a chunk.

        Raises:
            ValueError: not seven finite numbers.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"libero: an action of 7 finite numbers expected, got {action}")
        self.steps += 1
        self.success = self._advance(action, look=look) or self.success
        return self.success

    @property
    def over(self) -> bool:
        """Done, or out of steps."""
        return self.success or self.steps >= self.task.max_steps

    @property
    def held(self) -> str | None:
        """The simulator's name of the movable object between the fingers, both of which touch it; only for judges and experts."""
        scene, parts = self._simulator.env, self._simulator.robots[0].gripper.important_geoms
        fingers = [parts["left_finger"], parts["right_finger"]]  # whole: the neck of a bottle is held above the pads
        return next((name for name, body in scene.objects_dict.items() if scene._check_grasp(fingers, body)), None)

    def poses(self) -> dict[str, tuple[Float[np.ndarray, "3"], Float[np.ndarray, "4"]]]:
        """Positions [m] and xyzw quaternions, float64, of the movable objects and of all that the goal names; only for judges
        and experts."""
        scene = self._simulator.env
        goal = [name for _, *names in scene.parsed_problem["goal_state"] for name in names]
        return {name: self._pose(name) for name in dict.fromkeys([*scene.objects_dict, *goal])}

    def close(self) -> None:
        """Frees the renderer."""
        if self._simulator is not None:
            self._simulator.close()
        self._simulator = None

    def _build(self, seed: int) -> None:
        """A simulator for every episode: a used one keeps its sensors' clocks and draws more numbers at every reset."""
        self.close()
        self._simulator = self._module.ControlEnv(
            bddl_file_name=str(self.task.bddl_file),
            use_camera_obs=self.cameras,
            has_offscreen_renderer=self.cameras,
            camera_heights=IMAGE_SIZE,
            camera_widths=IMAGE_SIZE,
        )
        self._simulator.seed(seed)
        for left in reversed(range(PLACEMENT_TRIES)):  # its own reset would swallow every error and try for ever
            try:
                self._simulator.env.reset()
                return
            except self._module.RandomizationError:
                if not left:
                    raise

    def _pose(self, name: str) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "4"]]:
        """Of an object, a fixture or, where it is neither, a region."""
        data, bodies = self._simulator.sim.data, self._simulator.env.obj_body_id
        if name in bodies:
            return data.body_xpos[bodies[name]].copy(), np.roll(data.body_xquat[bodies[name]], -1)
        turned = self._module.suite.utils.transform_utils.mat2quat(data.get_site_xmat(name))
        return data.get_site_xpos(name).copy(), np.asarray(turned, np.float64)

    def _render_on_demand(self) -> None:
        """Cameras keep robosuite's moment of exposure, but are only exposed while ``_look`` is set."""
        for camera in CAMERAS.values() if self.cameras else ():
            name = f"{camera}_image"
            sensor = self._simulator.env._observables[name]._sensor
            self._simulator.env.modify_observable(name, "sensor", self._on_demand(sensor))

    def _on_demand(self, sensor: Any) -> Any:
        blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

        def expose(cache: dict[str, Any]) -> np.ndarray:
            return sensor(cache) if self._look else blank

        expose.__modality__ = sensor.__modality__  # type: ignore[attr-defined]
        return expose

    def _advance(self, action: Float[np.ndarray, "7"], *, look: bool) -> bool:
        self._look = look and self.cameras
        seen, _, done, _ = self._simulator.step(action)
        images = {name: _upright(seen[f"{camera}_image"]) for name, camera in CAMERAS.items()} if self._look else {}
        self.observation = {**images, "state": state_vector(seen)}
        return bool(done)


def _upright(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Turned by 180 degrees, as the training sets are."""
    return np.ascontiguousarray(image[::-1, ::-1])


def _language(name: str) -> str:
    """Of a task's file name without the scene, as the training sets have it; 29 of the task files word it differently."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _package() -> Path:
    """The folder of ``libero.libero``, found without running it."""
    spec = importlib.util.find_spec("libero")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / "libero" / "benchmark").is_dir():
            return Path(folder) / "libero"
    raise ModuleNotFoundError(f"the LIBERO simulator is not installed; {_INSTALL}", name="libero")


def _simulator(assets: Path | None) -> ModuleType:
    """The module of ``ControlEnv``, set up so that it neither asks on stdin, nor downloads, nor looks for a screen."""
    package = _package()
    folder = assets or package / "assets"
    if not (folder / "scenes").is_dir():
        raise FileNotFoundError(
            f"{folder}: no LIBERO assets (scenes, textures, objects) there; unpack them and pass that folder "
            f"as `assets`, or link it: ln -s ASSETS {package / 'assets'}"
        )
    config = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(cache_folder() / "libero"))) / "config.yaml"
    if not config.exists():
        write_whole(config, b"{}\n")
    os.environ.setdefault("MUJOCO_GL", "egl")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it advises every process to set up private macros
    try:
        # hf-libero has no setting for the folder besides a link in the package; this is what it remembers it by
        package_module: Any = importlib.import_module("libero.libero")
        package_module._assets_path_cache = str(folder.absolute())
        return importlib.import_module("libero.libero.envs.env_wrapper")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the LIBERO simulator needs {error.name}; {_INSTALL}", name=error.name) from error
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeError(
            f"the LIBERO simulator cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); on Debian install "
            "libegl1 and libgl1-mesa-dri (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa)"
        ) from error
