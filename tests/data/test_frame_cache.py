"""Frames kept on disk: the same samples, each decoded once; damage, full disks and changed sets are noticed."""

import dataclasses
import errno
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.data.frame_cache import FrameCache, open_cache
from fusevla.data.lerobot import LeRobotSet, open_set
from fusevla.data.samples import SampleSource
from fusevla.presets import TINY, DataConfig
from fusevla.tokens.tokenizer import train_tokenizer
from tests.data import lerobot_sets as sets

SIZE = 6
RECORD = 4 + 3 * SIZE**2


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return sets.write(tmp_path / "set")


def source(root: Path, cache: Path | None) -> SampleSource:
    data = DataConfig(use_reasoning=False, frame_cache=None if cache is None else str(cache))
    frames = open_set(root)
    tokenizer = train_tokenizer([episode.task for episode in frames.episodes])
    model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    return SampleSource(frames, None, tokenizer, None, data, model)


def images(source: SampleSource, index: int) -> dict[str, np.ndarray]:
    found = source(index, 0, 0).images
    return {camera: image for camera, image in found.items() if image is not None}


def test_samples_are_the_same_and_every_frame_is_decoded_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cached = source(root, None), source(root, tmp_path / "cache")
    for index in range(len(plain)):
        np.testing.assert_equal(images(cached, index), images(plain, index))
    monkeypatch.setattr(LeRobotSet, "picture", lambda *_: pytest.fail("decoded again"))
    for again in (cached, pickle.loads(pickle.dumps(cached)), source(root, tmp_path / "cache")):
        for index in range(len(plain)):
            assert set(images(again, index)) == {"base_0_rgb", "left_wrist_0_rgb"}
    monkeypatch.undo()
    np.testing.assert_equal(images(cached, 3), images(plain, 3))


def test_rows_never_put_are_none_and_black_ones_are_kept(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "new", SIZE)
    assert cache.get("base", 0) is None
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    cache.put("base", 5, black)
    np.testing.assert_array_equal(cache.get("base", 5), black)
    assert [cache.get("base", row) for row in (0, 4, 6)] == [None] * 3
    assert cache.get("wrist", 5) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.integers(0, RECORD - 1), st.integers(1, 255))
def test_a_damaged_record_is_decoded_anew(tmp_path_factory: pytest.TempPathFactory, row: int, byte: int, flip: int) -> None:
    cache = FrameCache(tmp_path_factory.mktemp("cache"), SIZE)
    for i in range(3):
        cache.put("base", i, frame(i))
    file = cache.folder / f"base-{SIZE}.frames"
    content = bytearray(file.read_bytes())
    content[row * RECORD + byte] ^= flip
    file.write_bytes(content)
    for i in range(3):
        kept = cache.get("base", i)
        assert (kept is None) == (i == row)
        if kept is not None:
            np.testing.assert_array_equal(kept, frame(i))
    cache.put("base", row, frame(row))
    np.testing.assert_array_equal(cache.get("base", row), frame(row))


@given(st.integers(0, 2 * RECORD - 1))
def test_a_file_cut_short_loses_only_what_was_cut(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    cache = FrameCache(tmp_path_factory.mktemp("cache"), SIZE)
    cache.put("base", 0, frame(0))
    cache.put("base", 1, frame(1))
    os.truncate(cache.folder / f"base-{SIZE}.frames", length)
    assert (cache.get("base", 0) is not None) == (length >= RECORD)
    assert cache.get("base", 1) is None


def test_a_set_that_changed_has_another_folder(root: Path, tmp_path: Path) -> None:
    first = open_cache(tmp_path / "cache", root, ("base_0_rgb",), SIZE).folder
    assert open_cache(tmp_path / "cache", root, (), SIZE).folder == first
    os.utime(sets.episode_file(root, 0), ns=(1, 1))
    assert open_cache(tmp_path / "cache", root, (), SIZE).folder != first
    moved = shutil.copytree(root, tmp_path / "elsewhere" / root.name)
    assert open_cache(tmp_path / "cache", moved, (), SIZE).folder == open_cache(tmp_path / "cache", root, (), SIZE).folder


def test_a_full_disk_costs_one_warning_and_no_sample(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    plain, cached = source(root, None), source(root, tmp_path / "cache")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match=r"no more frames are kept \(No space left on device\)"):
        np.testing.assert_equal(images(cached, 0), images(plain, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_equal(images(cached, 1), images(plain, 1))


def test_a_folder_that_cannot_be_made_is_known_at_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"frame cache: .* cannot be written \(Not a directory\)"):
        source(root, tmp_path / "file" / "cache")
