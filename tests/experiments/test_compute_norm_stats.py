"""Statistics from the command line: exact, those of training where asked for, and clear about what is degenerate or wrong."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fusevla.data.normalize import load_norm_stats
from fusevla.presets import DataConfig
from fusevla.train.material import make_stats, open_sets
from tests.data import lerobot_sets as sets
from tests.experiments.help_text import help_without

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "experiments" / "compute_norm_stats.py")


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_every_frame_counts_and_what_is_degenerate_is_said(tmp_path, monkeypatch, capsys) -> None:
    episodes = sets.episodes((5, 7, 6))
    for episode in episodes:
        episode.state[:, 7] = 0.5
    root = sets.write_lerobot_v21(tmp_path / "set", episodes)
    run(monkeypatch, "--data", root, "--out", tmp_path / "new" / "stats.json")
    stats = load_norm_stats(tmp_path / "new" / "stats.json")
    for key, rows in (("state", [e.state for e in episodes]), ("actions", [e.actions for e in episodes])):
        values = np.concatenate(rows).astype(np.float64)
        np.testing.assert_allclose(stats[key].mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats[key].std, values.std(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(stats[key].q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_array_equal(stats[key].q99, np.quantile(values, 0.99, axis=0))
    said = capsys.readouterr().out
    assert "18 frames of 3 episodes used, 0 held out" in said
    assert [line for line in said.splitlines() if " is constant" in line] == [
        "state 7 is constant: training clips it to [-1, 1] instead of dividing by its spread"
    ]


def test_the_held_out_share_gives_the_statistics_of_training(tmp_path, monkeypatch) -> None:
    root = sets.write(tmp_path / "set")
    run(monkeypatch, "--data", root, "--out", tmp_path, "--held-out", "0.4")
    data = DataConfig(data=str(root), use_reasoning=False, held_out_fraction=0.4)
    opened = open_sets(data)
    assert opened[0].held_out
    expected = make_stats(data, opened)
    assert expected is not None
    for key, entry in load_norm_stats(tmp_path / "norm_stats.json").items():
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(entry, field), getattr(expected[key], field))


def test_columns_can_be_named_and_images_may_be_damaged_or_absent(tmp_path, monkeypatch) -> None:
    root = sets.write(tmp_path / "set")
    for index in range(3):
        sets.edit_table(sets.episode_file(root, index), image=None, wrist_image=None)
    run(monkeypatch, "--data", root, "--out", tmp_path, "--columns", "state", "actions")
    stats = load_norm_stats(tmp_path)
    np.testing.assert_array_equal(stats["state"].q99, stats["actions"].q99)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "nowhere"), "is not a folder"),
        (("--held-out", "1"), "held_out_fraction: expected 0 <= fraction < 1"),
        (("--columns", "state", "pose"), "'pose'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, options, words) -> None:
    root = sets.write(tmp_path / "set")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--data", root, "--out", tmp_path / "out.json", *options)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_help_imports_nothing_heavy() -> None:
    assert "--held-out" in help_without(SCRIPT, ("jax", "pyarrow", "numpy"))
