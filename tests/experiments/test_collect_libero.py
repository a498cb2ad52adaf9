"""The collecting script: bad input before anything long; where the simulator is, a set that the other scripts take."""

import importlib.util
import json
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import collect_libero
from fusevla.data.annotations import check_annotations, load_annotations
from fusevla.data.lerobot import open_set
from fusevla.data.normalize import load_norm_stats
from tests.experiments.help_text import ROOT, help_without

SCRIPT = str(ROOT / "experiments" / "collect_libero.py")
NAMES = ["pick_up_the_milk_and_place_it_in_the_basket", "open_the_drawer", "pick_up_the_moka_pot_and_place_it_in_the_basket"]


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    return collect_libero


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package laid out as hf-libero, with three tasks of four initial states, and no simulator."""
    folder = tmp_path / "installed" / "libero" / "libero"
    for name in ("benchmark", "bddl_files/libero_object", "init_files/libero_object"):
        (folder / name).mkdir(parents=True)
    (folder / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {{'libero_object': {NAMES!r}}}")
    for name, item in zip(NAMES, ("milk_1", "drawer_1", "moka_pot_1"), strict=True):
        goal = f"(:goal (And (In {item} basket_1_contain_region)))"
        (folder / "bddl_files" / "libero_object" / f"{name}.bddl").write_text(goal)
        with zipfile.ZipFile(folder / "init_files" / "libero_object" / f"{name}.pruned_init", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(np.zeros((4, 9)), protocol=2))
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    return folder


def refused(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The message."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite", "kitchen"), "unknown suite 'kitchen'; expected one of libero_spatial"),
        (("--tasks", "3"), "--tasks: expected different numbers from 0 to 2 such as 0,1, got '3'"),
        (("--tasks", "0,0"), "got '0,0'"),
        (("--tasks", "milk"), "got 'milk'"),
        (("--tasks", "1"), "1 is 'open the drawer'"),
        (("--tasks", "2"), "2 is 'pick up the moka pot and place it in the basket'"),
        (("--first-init", "4"), "expected 0 <= first <= last <= 3, got 4, 3"),
        (("--first-init", "2", "--last-init", "1"), "got 2, 1"),
        (("--last-init", "9"), "got 0, 9"),
        (("--episodes", "0"), "--episodes: expected at least 1, got 0"),
        (("--workers", "0"), "--workers: expected at least 1, got 0"),
        (("--out", "full"), "full exists and is not empty"),
        ((), "no LIBERO assets"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    script: Any,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    monkeypatch.chdir(tmp_path)
    said = refused(script, monkeypatch, capsys, "--suite", "object", "--tasks", "0", "--out", "new", *flags)
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("new*"))


def test_without_the_simulator_the_extra_is_named(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(script, monkeypatch, capsys, "--suite", "object", "--tasks", "0", "--out", "new")
    assert "pip install 'fusevla[libero]'" in said


def test_tries_made_in_another_way_are_not_mixed(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.tries" / "settings.json"
    script.same_settings(path, {"seed": 0})
    script.same_settings(path, {"seed": 0})
    with pytest.raises(script.RefusedError, match=r"holds tries made with \{'seed': 0\}, asked for are \{'seed': 1\}"):
        script.same_settings(path, {"seed": 1})


def test_help_is_quick() -> None:
    assert "--first-init" in help_without(SCRIPT, ("jax", "numpy", "PIL", "pyarrow"))


@pytest.mark.slow
def test_a_task_is_collected_and_prepared(assets: Path | None, tmp_path: Path) -> None:
    out = tmp_path / "set"
    where = () if assets is None else ("--assets", assets)
    flags = ("--suite", "object", "--tasks", 0, "--episodes", 2, "--first-init", 3, "--last-init", 3, "--out", out, *where)
    done = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "initial states 3 to 3" in done.stdout
    frames, thoughts = open_set(out), load_annotations(out / "cot_simple.json")
    check_annotations(thoughts, {episode.index: episode.length for episode in frames.episodes})
    assert [episode.task for episode in frames.episodes] == ["pick up the alphabet soup and place it in the basket"] * 2
    assert (frames.state.shape[1], frames.actions.shape[1], frames.fps) == (8, 7, 10)
    assert np.abs(frames.actions).max() <= 1
    first, second = (frames.episode_slice(i) for i in range(2))
    np.testing.assert_array_equal(frames.state[first.start], frames.state[second.start])  # the same initial state
    assert not np.array_equal(frames.actions[first][:60], frames.actions[second][:60])  # done in another way
    for camera in frames.cameras:
        assert frames.image(camera, 0).shape == (256, 256, 3)
        assert np.abs(frames.image(camera, 0).astype(int) - frames.image(camera, first.stop - 1)).mean() > 5
    for index, rows in enumerate((first, second)):
        grasp, release = (thoughts.episodes[index].segments[i].start_step for i in (2, 4))
        grip = frames.actions[rows][:, 6]
        assert (grip[grasp : release - 15] == 1).all()
        assert (grip[release:] == -1).all()
    assert set(load_norm_stats(out)) == {"state", "actions"}
    assert (out / "contact_sheet.png").stat().st_size > 10_000
    assert (out / "episode_000000.mp4").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    prepare = ("--data", out, "--annotations", out / "cot_simple.json", "--out", tmp_path / "ready")
    command = [sys.executable, str(ROOT / "experiments" / "prepare_libero.py"), *map(str, prepare)]
    ready = subprocess.run([*command, "--tokenizer", "train"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ready.returncode == 0, ready.stderr
    assert json.loads((tmp_path / "ready" / "report.json").read_text())["warnings"] == []
