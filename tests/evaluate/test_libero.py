"""LIBERO: suites, initial states and the state vector without the simulator; where it is installed, whole episodes."""

import importlib
import importlib.util
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusevla.evaluate.libero import MAX_STEPS, NO_OP, LiberoEnv, axis_angle, state_vector, suite_name, tasks
from fusevla.evaluate.libero_init import read_init_states

NAMES = {
    "libero_object": ["pick_up_the_milk_and_place_it_in_the_basket", "pick_up_the_butter_and_place_it_in_the_basket"],
    "libero_10": ["KITCHEN_SCENE8_put_both_moka_pots_on_the_stove", "LIVING_ROOM_SCENE10_close_the_book"],
}


def rotated(vector: np.ndarray, axis_times_angle: np.ndarray) -> np.ndarray:
    """Rodrigues' formula."""
    angle = np.linalg.norm(axis_times_angle)
    axis = axis_times_angle / angle if angle else np.zeros(3)
    along = axis * (axis @ vector) * (1 - np.cos(angle))
    return vector * np.cos(angle) + np.cross(axis, vector) * np.sin(angle) + along


def rotated_by_quaternion(vector: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    twice = 2 * np.cross(quaternion[:3], vector)
    return vector + quaternion[3] * twice + np.cross(quaternion[:3], twice)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q[:3]) > 0.01))
def test_axis_angle_is_the_quaternion_s_rotation_and_is_not_wrapped(parts: list[float]) -> None:
    quaternion = np.array(parts) / np.linalg.norm(parts)
    vector, turned = np.array([0.3, -1.0, 0.5]), axis_angle(quaternion)
    np.testing.assert_allclose(rotated(vector, turned), rotated_by_quaternion(vector, quaternion), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(turned), 2 * np.arccos(quaternion[3]))


def test_an_angle_beyond_pi_stays_one() -> None:
    assert axis_angle(np.array([0.6, 0.0, 0.0, -0.8])) == pytest.approx([2 * np.arccos(-0.8), 0.0, 0.0])


@pytest.mark.parametrize("w", [1.0, -1.0, 1.0 + 1e-9])
def test_no_axis_means_zeros(w: float) -> None:
    assert axis_angle(np.array([0.0, 0.0, 0.0, w])).tolist() == [0.0, 0.0, 0.0]


def test_the_state_is_position_rotation_fingers() -> None:
    quarter = np.array([0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)])
    seen = {"robot0_eef_pos": np.arange(3.0), "robot0_eef_quat": quarter, "robot0_gripper_qpos": np.array([0.04, -0.04])}
    state = state_vector(seen)
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [0, 1, 2, 0, 0, np.pi / 2, 0.04, -0.04], atol=1e-6)


def test_suites_go_by_both_names() -> None:
    assert [suite_name(name.removeprefix("libero_")) for name in MAX_STEPS] == [suite_name(name) for name in MAX_STEPS]
    assert MAX_STEPS["libero_10"] == 520
    with pytest.raises(ValueError, match="unknown suite 'kitchen'; expected one of libero_spatial"):
        suite_name("kitchen")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package laid out as hf-libero, of which only the table of tasks can be run."""
    folder = tmp_path / "libero" / "libero"
    (folder / "benchmark").mkdir(parents=True)
    (folder / "benchmark" / "__init__.py").write_text("import not_to_be_imported")
    (folder / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {NAMES!r}")
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_tasks_come_in_order_with_their_instruction_and_files(package: Path) -> None:
    found = tasks("object")
    assert [task.language for task in found] == [name.replace("_", " ") for name in NAMES["libero_object"]]
    assert [task.index for task in found] == [0, 1]
    assert found[1].init_file == package / "init_files" / "libero_object" / f"{NAMES['libero_object'][1]}.pruned_init"
    assert found[1].bddl_file == package / "bddl_files" / "libero_object" / f"{NAMES['libero_object'][1]}.bddl"
    assert found[1].max_steps == 280


def test_the_scene_is_no_part_of_the_instruction(package: Path) -> None:
    assert [task.language for task in tasks("10")] == ["put both moka pots on the stove", "close the book"]


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusevla\[libero\]'"):
        tasks("object")


def test_without_assets_both_remedies_are_named(package: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no LIBERO assets .*`assets`, or link it: ln -s ASSETS .*libero/assets"):
        LiberoEnv(tasks("object")[0])
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no LIBERO assets"):
        LiberoEnv(tasks("object")[0], assets=tmp_path)


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (ModuleNotFoundError("gone", name="robosuite"), ModuleNotFoundError, r"needs robosuite; .*fusevla\[libero\]"),
        (ImportError("no display"), RuntimeError, r"MUJOCO_GL=osmesa \(no display\).*libosmesa6"),
        (AttributeError("'NoneType' has no eglQueryDevices"), RuntimeError, "libegl1 and libgl1-mesa-dri"),
    ],
)
def test_what_the_simulator_lacks_is_said_and_nothing_is_asked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], match: str
) -> None:
    def refuse(name: str) -> None:
        assert (tmp_path / "config" / "config.yaml").exists()  # without it the import asks on stdin
        raise failure

    (package / "assets" / "scenes").mkdir(parents=True)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(error, match=match):
        LiberoEnv(tasks("object")[0])


def test_a_configuration_that_is_there_stays(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    (tmp_path / "config.yaml").write_text("datasets: mine")
    (package / "assets" / "scenes").mkdir(parents=True)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(RuntimeError):
        LiberoEnv(tasks("object")[0])
    assert (tmp_path / "config.yaml").read_text() == "datasets: mine"


def stored(path: Path, content: object) -> Path:
    """As ``torch.save`` lays it out."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("old", [True, False])
def test_initial_states_are_read_back(tmp_path: Path, old: bool) -> None:
    states = np.random.default_rng(0).standard_normal((5, 11))
    path = stored(tmp_path / "a.pruned_init", states)
    if old:  # NumPy 1, which wrote the published files, has another name for it
        text = pickle.dumps(states, protocol=2).replace(b"numpy._core.", b"numpy.core.")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", text)
    np.testing.assert_array_equal(read_init_states(path), states)


class Harm:
    """Makes a folder when it is unpickled in the ordinary way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    harm = Harm(tmp_path / "made")
    for number, content in enumerate([harm, [np.zeros((2, 2)), harm], np.array([[harm]], object)]):
        with pytest.raises(ValueError, match=r"it asks for posix\.mkdir"):
            read_init_states(stored(tmp_path / f"{number}.pruned_init", content))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [np.zeros(3), np.full((2, 2), np.nan), np.zeros((2, 2), np.int64), "text", None])
def test_anything_but_a_matrix_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="expected one matrix of finite numbers"):
        read_init_states(stored(tmp_path / "a.pruned_init", content))


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.pruned_init: not a readable file of initial states"):
        read_init_states(tmp_path / "gone.pruned_init")
    (tmp_path / "a.pruned_init").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match="install hf-libero again"):
        read_init_states(tmp_path / "a.pruned_init")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the simulator's own
def test_episodes_repeat_end_and_agree_with_recorded_ones(assets: Path | None, libero_sample: Path) -> None:
    env = LiberoEnv(tasks("object")[0], assets=assets)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    first = env.reset(1)
    for action in actions:
        env.step(action)
    looked = env.observation
    env.reset(2)
    assert all(np.array_equal(first[key], value) for key, value in env.reset(1).items())
    for action in actions[:-1]:
        env.step(action, look=False)
        assert env.observation.keys() == {"state"}
    env.step(actions[-1])
    assert all(np.array_equal(looked[key], value) for key, value in env.observation.items())

    while not env.over:
        assert not env.step(np.array(NO_OP), look=False)
    assert (env.steps, env.success) == (env.task.max_steps, False)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="0 to 49 expected, got 50"):
        env.reset(50)
    replay(env, libero_sample)
    env.close()


def replay(env: LiberoEnv, sample: Path) -> None:
    """The first recorded episode: of this task, from initial state 0."""
    episode = pq.read_table(sample / "data" / "chunk-000" / "episode_000000.parquet").to_pydict()
    assert json.loads((sample / "meta" / "tasks.jsonl").read_text().splitlines()[0])["task"] == env.task.language
    seen = env.reset(0)
    for camera, column in (("base_0_rgb", "image"), ("left_wrist_0_rgb", "wrist_image")):
        recorded = np.asarray(Image.open(io.BytesIO(episode[column][0]["bytes"])), np.float64)
        assert np.abs(recorded - seen[camera]).mean() < 3  # JPEG: 1.6; another initial state or orientation: from 4 on
    for state, action in zip(episode["state"], episode["actions"], strict=True):
        np.testing.assert_allclose(env.observation["state"], state, atol=1e-3)
        env.step(np.array(action, np.float64), look=False)
    assert env.success
    assert env.steps == len(episode["actions"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the simulator's own
def test_without_cameras_the_physics_are_the_same(assets: Path | None) -> None:
    states = []
    for cameras in (True, False):
        env = LiberoEnv(tasks("object")[0], cameras=cameras, assets=assets)
        assert (env.reset(0).keys() == {"state"}) == (not cameras)
        for action in np.random.default_rng(0).uniform(-1, 1, (6, 7)):
            env.step(action)
        states.append(env.observation["state"])
        env.close()
    np.testing.assert_array_equal(*states)
