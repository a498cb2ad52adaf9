"""Random damage gives a clear error or the right samples: never a foreign traceback, a hang, or a silently wrong sample."""

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fusevla.data.annotations import choose_thought
from fusevla.data.lerobot import open_set
from fusevla.data.validate import Findings, Rules, validate
from tests.data import corrupt
from tests.data import lerobot_sets as sets

SECONDS = 30


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return corrupt.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def alarm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"validate took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check_content(found: Findings, what: str) -> None:
    """The samples of what loads are those that were written, apart from pixels, or a warning says otherwise."""
    frames, annotations = found.frames, found.annotations
    assert frames is not None
    assert annotations is not None
    written = sets.episodes(corrupt.LENGTHS, size=4)
    for i, episode in enumerate(frames.episodes):
        truth = written[episode.index]
        assert (episode.task, episode.length) == (truth.task, len(truth.actions)), what
        rows = frames.episode_slice(i)
        same = all(
            np.allclose(table[rows], values, atol=0.1)
            for table, values in ((frames.state, truth.state), (frames.actions, truth.actions))
        )
        assert same or any("statistics" in warning for warning in found.warnings), what
        for camera, column in (("base_0_rgb", "image"), ("left_wrist_0_rgb", "wrist_image")):
            images = np.stack([frames.image(camera, row) for row in range(rows.start, rows.stop)])
            np.testing.assert_array_equal(images, truth.images[column], err_msg=what)
        steps = [(s.start_step, s.end_step) for s in annotations.episodes[episode.index].segments]
        if episode.index not in annotations.vision_language:
            assert steps[0][0] == 0
            assert [start for start, _ in steps[1:]] == [end for _, end in steps[:-1]], what
            assert all(end > start for start, end in steps[:-1]), what
        for frame in range(episode.length):
            vision_language = episode.index in annotations.vision_language
            thought = choose_thought(
                annotations.episodes[episode.index], frame, episode.length, 0.3, 0.3, vision_language=vision_language
            )
            assert thought.prefix.strip()


def run(root: Path, seed: int) -> str | None:
    """One case; what was damaged where it loads all the same."""
    with tempfile.TemporaryDirectory() as folder:
        damaged = corrupt.copy(root, Path(folder) / "set")
        what = f"seed {seed}, {root.name}, {corrupt.corrupt(damaged, np.random.default_rng(seed))}"
        signal.alarm(SECONDS)
        try:
            found = validate(damaged, damaged / "cot_simple.json", Rules())
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        assert all(isinstance(defect, str) and len(defect) < 2000 for defect in found.defects), what
        if found.defects:
            assert found.frames is None
            return None
        check_content(found, what)
        return what


def check_seeds(roots: list[Path], seeds: range) -> None:
    loaded = [what for seed in seeds if (what := run(roots[seed % len(roots)], seed)) is not None]
    assert 0.02 * len(seeds) < len(loaded) < 0.7 * len(seeds), loaded  # both ends of the promise are put to the test


def test_random_damage(roots: list[Path], alarm: None) -> None:
    check_seeds(roots, range(90))


@pytest.mark.slow
def test_much_random_damage(roots: list[Path], alarm: None) -> None:
    check_seeds(roots, range(1000, 2500))


def test_undamaged_sets_have_no_defect_and_no_warning(roots: list[Path]) -> None:
    for root in roots:
        found = validate(root, root / "cot_simple.json")
        assert (found.defects, found.warnings) == ((), ())
        check_content(found, root.name)
        assert json.loads((root / "meta/info.json").read_text())["codebase_version"] == open_set(root).version
