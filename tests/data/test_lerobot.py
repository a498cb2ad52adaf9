import contextlib
import io
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fusevla.data.lerobot import EpisodeFrames, LeRobotError, LeRobotSet, encode_image, open_set, write_lerobot_v21
from fusevla.data.lerobot_columns import find_column
from fusevla.data.parquet_pages import ByteColumn, PageCache
from tests.data import lerobot_sets as sets

SAMPLE = Path(__file__).parents[3] / "shared/libero_sample"
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the LIBERO sample set is not beside the repository")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return sets.write(tmp_path / "set")


@pytest.fixture(params=["v2.0", "v2.1", "v3.0"])
def any_version(request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> Path:
    if request.param == "v2.0":
        return sets.as_v20(root, tmp_path / "v20")
    return root if request.param == "v2.1" else sets.as_v30(root, tmp_path / "v30")


def check_content(data: LeRobotSet, written: list[EpisodeFrames]) -> None:
    assert [(e.task, e.length) for e in data.episodes] == [(e.task, len(e.actions)) for e in written]
    for i, episode in enumerate(written):
        rows = data.episode_slice(i)
        np.testing.assert_array_equal(data.state[rows], episode.state)
        np.testing.assert_array_equal(data.actions[rows], episode.actions)
        for frame in range(len(episode.actions)):
            assert data.locate(rows.start + frame) == (i, frame)
            np.testing.assert_array_equal(data.image("base_0_rgb", rows.start + frame), episode.images["image"][frame])
            np.testing.assert_array_equal(
                data.image("left_wrist_0_rgb", rows.start + frame), episode.images["wrist_image"][frame]
            )


def test_what_is_written_is_read_in_every_version(any_version: Path) -> None:
    data = open_set(any_version)
    assert data.state.dtype == data.actions.dtype == np.float32
    assert len(data) == sum(sets.LENGTHS)
    assert data.fps == 10
    check_content(data, sets.episodes())


def test_pickled_set_reads_the_same(any_version: Path) -> None:
    data = open_set(any_version)
    data.image("base_0_rgb", 3)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 20_000  # tables of 18 frames, no pages
    check_content(copy, sets.episodes())


def test_episode_numbers_may_have_gaps_and_any_order(tmp_path: Path, root: Path) -> None:
    records = (root / "meta/episodes.jsonl").read_text().splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join([records[2], records[0]]))
    sets.edit_info(root, total_episodes=2, total_frames=11)
    data = open_set(root)
    assert [episode.index for episode in data.episodes] == [0, 2]
    written = sets.episodes()
    check_content(data, [written[0], written[2]])


def test_two_opened_sets_do_not_share_pages(tmp_path: Path) -> None:
    first, second = (write_lerobot_v21(tmp_path / name, sets.episodes((3,), seed=seed)) for name, seed in (("a", 1), ("b", 2)))
    images = [open_set(path).image("base_0_rgb", 0) for path in (first, second)]
    assert (images[0] != images[1]).any()


@needs_sample
def test_real_sample() -> None:
    data = open_set(SAMPLE)
    assert (data.version, len(data.episodes), len(data), data.fps) == ("v2.1", 12, 1636, 10)
    assert (data.state.shape, data.actions.shape) == ((1636, 8), (1636, 7))
    assert data.episodes[3].task == "pick up the cream cheese and place it in the basket"
    table = pq.read_table(sets.episode_file(SAMPLE, 2))
    row = data.episode_slice(2).start + 50
    np.testing.assert_array_equal(data.state[row], table["state"][50].as_py())
    for camera, column in (("base_0_rgb", "image"), ("left_wrist_0_rgb", "wrist_image")):
        expected = np.asarray(Image.open(io.BytesIO(table[column][50]["bytes"].as_py())))
        np.testing.assert_array_equal(data.image(camera, row), expected)


@needs_sample
def test_writer_reproduces_the_schema_of_the_sample(root: Path) -> None:
    ours, theirs = (pq.read_schema(sets.episode_file(path, 0)) for path in (root, SAMPLE))
    assert ours.equals(theirs)
    info = [json.loads((path / "meta/info.json").read_text()) for path in (root, SAMPLE)]
    assert list(info[0]) == list(info[1])
    assert list(info[0]["features"]) == list(info[1]["features"])
    stats = [json.loads((path / "meta/episodes_stats.jsonl").read_text().splitlines()[0])["stats"] for path in (root, SAMPLE)]
    for name in stats[1]:
        assert {k: np.shape(v) for k, v in stats[0][name].items()} == {k: np.shape(v) for k, v in stats[1][name].items()}


def test_written_statistics_are_those_of_the_columns(root: Path) -> None:
    record = json.loads((root / "meta/episodes_stats.jsonl").read_text().splitlines()[1])["stats"]
    episode = sets.episodes()[1]
    np.testing.assert_allclose(record["actions"]["mean"], episode.actions.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        np.ravel(record["image"]["mean"]), np.mean(np.asarray(episode.images["image"]) / 255, axis=(0, 1, 2))
    )


def test_writer_never_touches_an_existing_set(root: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        sets.write(root)


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from sets.episodes((3,))
        raise RuntimeError("simulator died")

    with pytest.raises(RuntimeError):
        write_lerobot_v21(tmp_path / "set", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros((4, 8), np.float32)}, "same number of frames"),
        ({"actions": np.full((5, 7), np.nan, np.float32)}, "finite"),
        ({"task": "  "}, "empty task"),
        ({"images": {"image": np.zeros((5, 8, 8), np.uint8)}}, "uint8"),
    ],
)
def test_writer_refuses_bad_episodes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = sets.episodes((5,))[0]
    with pytest.raises(ValueError, match=message):
        write_lerobot_v21(tmp_path / "set", [EpisodeFrames(**({f: getattr(good, f) for f in good.__dict__} | change))])


def test_jpeg_sets(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], (16, 16, 3))
    episode = EpisodeFrames("push", {"image": np.stack([smooth] * 2)}, np.zeros((2, 8), np.float32), np.zeros((2, 7), np.float32))
    data = open_set(write_lerobot_v21(tmp_path / "set", [episode], image_format="jpeg"), cameras=("base_0_rgb",))
    assert np.abs(data.image("base_0_rgb", 1).astype(int) - smooth).max() < 8


# Columns


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("base_0_rgb", ["image", "wrist_image"], "image"),
        ("base_0_rgb", ["image_1", "image_wrist_1"], "image_1"),
        ("left_wrist_0_rgb", ["image_1", "image_wrist_1"], "image_wrist_1"),
        ("base_0_rgb", ["observation.images.image", "observation.images.image2"], "observation.images.image"),
        ("left_wrist_0_rgb", ["observation.images.image", "observation.images.image2"], "observation.images.image2"),
        ("left_wrist_0_rgb", ["observation.images.wrist_image"], "observation.images.wrist_image"),
        ("base_0_rgb", ["observation.images.base_0_rgb"], "observation.images.base_0_rgb"),
        ("state", ["observation.state", "action"], "observation.state"),
        ("actions", ["observation.state", "action"], "action"),
    ],
)
def test_common_columns_are_recognised(name: str, available: list[str], expected: str) -> None:
    assert find_column(name, available) == expected


def test_configured_column_wins_and_a_wrong_one_is_named() -> None:
    assert find_column("base_0_rgb", ["image", "depth"], [("base_0_rgb", "depth")]) == "depth"
    with pytest.raises(ValueError, match="'nowhere'"):
        find_column("base_0_rgb", ["image"], [("base_0_rgb", "nowhere")])


def test_renamed_columns_of_a_whole_set(root: Path) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    names = {"image": "cam", "wrist_image": "observation.images.wrist", "state": "observation.state", "actions": "action"}
    sets.edit_info(root, features={names.get(k, k): v for k, v in info["features"].items()})
    for i in range(3):
        path = sets.episode_file(root, i)
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), path)
    check_content(open_set(root, columns=(("base_0_rgb", "cam"),)), sets.episodes())
    with pytest.raises(LeRobotError, match=r"'base_0_rgb'.*'cam'"):
        open_set(root)


# Ways to store an image


def set_image_column(root: Path, make: Callable[[dict[str, Any]], Any], kind: pa.DataType) -> None:
    for i in range(len(sets.LENGTHS)):
        rows = pq.read_table(sets.episode_file(root, i))["image"].to_pylist()
        sets.edit_table(sets.episode_file(root, i), image=pa.array([make(row) for row in rows], kind))


def test_plain_bytes(root: Path) -> None:
    set_image_column(root, lambda row: row["bytes"], pa.binary())
    check_content(open_set(root), sets.episodes())


def test_raw_pixels(root: Path) -> None:
    kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
    set_image_column(root, lambda row: np.asarray(Image.open(io.BytesIO(row["bytes"]))).tolist(), kind)
    check_content(open_set(root), sets.episodes())


def test_files_beside_the_table(root: Path) -> None:
    (root / "images").mkdir()
    for i in range(3):
        rows = pq.read_table(sets.episode_file(root, i))["image"].to_pylist()
        for row in rows:
            (root / f"images/{i}_{row['path']}").write_bytes(row["bytes"])
        values = [{"bytes": None, "path": f"images/{i}_{row['path']}"} for row in rows]
        sets.edit_table(
            sets.episode_file(root, i), image=pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        )
    check_content(open_set(root), sets.episodes())


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", None])
def test_image_files_outside_the_set_are_refused(root: Path, path: str | None) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    set_image_column(root, lambda row: {"bytes": None, "path": path}, kind)
    with pytest.raises(LeRobotError, match=r"episode_000000.parquet: image of episode 0, frame 2"):
        open_set(root).image("base_0_rgb", 2)


# Defects


def break_jsonl(root: Path) -> None:
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 5')


def truncate(root: Path) -> None:
    path = sets.episode_file(root, 1)
    path.write_bytes(path.read_bytes()[:-100])


def nan_state(root: Path) -> None:
    state = sets.episodes()[1].state.copy()
    state[3, 2] = np.nan
    sets.edit_table(sets.episode_file(root, 1), state=pa.FixedSizeListArray.from_arrays(state.reshape(-1), 8))


def ragged_actions(root: Path) -> None:
    sets.edit_table(sets.episode_file(root, 1), actions=[[0.0] * (7 - (i == 2)) for i in range(7)])


DEFECTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no set", lambda root: (root / "meta/info.json").unlink(), r"info.json: is missing"),
    ("info not JSON", lambda root: (root / "meta/info.json").write_text("{"), r"info.json: is not readable JSON"),
    ("info not UTF-8", lambda root: (root / "meta/info.json").write_bytes(b"\xff\xfe{"), r"info.json: is not readable JSON"),
    ("version", lambda root: sets.edit_info(root, codebase_version="v1.6"), r"one of v2.0, v2.1, v3.0; got 'v1.6'"),
    ("fps", lambda root: sets.edit_info(root, fps=0), r"fps must be a positive number; got 0"),
    ("fps lies", lambda root: sets.edit_info(root, fps=20), r"timestamps are 0.1 s apart; info.json says fps 20"),
    ("features", lambda root: sets.edit_info(root, features=[]), r"features must be an object"),
    ("frames lie", lambda root: sets.edit_info(root, total_frames=99), r"total_frames says 99, .* hold 18"),
    ("episodes lie", lambda root: sets.edit_info(root, total_episodes=4), r"total_episodes says 4"),
    ("template", lambda root: sets.edit_info(root, data_path="{nothing}"), r"no file follows from the path templates"),
    ("escape", lambda root: sets.edit_info(root, data_path="../{episode_index}"), r"leaves the set's folder"),
    ("jsonl", break_jsonl, r"episodes.jsonl line 1: is not JSON"),
    ("no tasks", lambda root: (root / "meta/tasks.jsonl").unlink(), r"tasks.jsonl: cannot be read"),
    ("missing file", lambda root: sets.episode_file(root, 1).unlink(), r"episode_000001.parquet: is missing \(episodes \[1\]"),
    ("truncated", truncate, r"episode_000001.parquet: cannot be read, it may be truncated"),
    ("NaN", nan_state, r"episode 1: state has 1 values that are NaN or infinite, the first in frame 3, dimension 2"),
    ("ragged", ragged_actions, r"rows have different sizes"),
    (
        "width",
        lambda root: sets.edit_table(sets.episode_file(root, 1), actions=[[0.0] * 6] * 7),
        r"7 numbers per row expected .* got 6",
    ),
    ("null", lambda root: sets.edit_table(sets.episode_file(root, 1), actions=[None] + [[0.0] * 7] * 6), r"1 rows are null"),
    ("text", lambda root: sets.edit_table(sets.episode_file(root, 1), state=["x"] * 7), r"numbers expected, got string"),
    ("no column", lambda root: sets.edit_table(sets.episode_file(root, 1), wrist_image=None), r"lacks column 'wrist_image'"),
    (
        "stranger",
        lambda root: sets.edit_table(sets.episode_file(root, 1), episode_index=[1] * 6 + [8]),
        r"has rows of episodes \[8\]",
    ),
    ("frames", lambda root: sets.edit_table(sets.episode_file(root, 1), frame_index=[0, 1, 3, 2, 4, 5, 6]), r"row 2 has .*3"),
    ("task", lambda root: sets.edit_table(sets.episode_file(root, 1), task_index=[9] * 7), r"task_index 9 is not in the table"),
    ("two tasks", lambda root: sets.edit_table(sets.episode_file(root, 1), task_index=[0] * 3 + [1] * 4), r"its frames have 2"),
    (
        "wrong task",
        lambda root: sets.edit_table(sets.episode_file(root, 1), task_index=[0] * 7),
        r"its record says task 'task number 1'",
    ),
]


@pytest.mark.parametrize(("make", "message"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_defects_are_named(root: Path, make: Callable[[Path], Any], message: str) -> None:
    make(root)
    with pytest.raises(LeRobotError, match=message):
        open_set(root)


def test_all_defects_are_reported_at_once(root: Path) -> None:
    truncate(root)
    sets.episode_file(root, 0).unlink()
    sets.edit_table(sets.episode_file(root, 2), task_index=[9] * 6)
    with pytest.raises(LeRobotError) as caught:
        open_set(root)
    assert len(caught.value.defects) == 3
    assert pickle.loads(pickle.dumps(caught.value)).defects == caught.value.defects


def test_missing_folder_and_rows_outside(tmp_path: Path, root: Path) -> None:
    with pytest.raises(LeRobotError, match="is not a folder"):
        open_set(tmp_path / "nowhere")
    for row in (-1, 18):
        with pytest.raises(IndexError, match="18 frames"):
            open_set(root).image("base_0_rgb", row)


@pytest.mark.parametrize("data", [b"", b"not an image", encode_image(np.zeros((16, 16, 3), np.uint8))[:50]])
def test_corrupt_image_bytes_are_located(root: Path, data: bytes) -> None:
    set_image_column(root, lambda row: data, pa.binary())
    with pytest.raises(LeRobotError, match=r"episode_000001.parquet: image of episode 1, frame 2 cannot be decoded"):
        open_set(root).image("base_0_rgb", 7)


def test_image_of_another_size_is_refused(root: Path) -> None:
    set_image_column(root, lambda row: encode_image(np.zeros((8, 8, 3), np.uint8)), pa.binary())
    with pytest.raises(LeRobotError, match=r"info.json says \[16, 16, 3\], the image is \[8, 8, 3\]"):
        open_set(root).image("base_0_rgb", 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 6), offset=st.integers(0, 1 << 20), cut=st.booleans(), value=st.integers(0, 255))
def test_damaged_bytes_give_a_clear_error_or_a_correct_set(
    tmp_path_factory: pytest.TempPathFactory, which: int, offset: int, cut: bool, value: int
) -> None:
    root = sets.write(tmp_path_factory.mktemp("fuzz") / "set", (3, 4))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = files[which % len(files)]
    data = bytearray(path.read_bytes())
    position = offset % len(data)
    if cut:
        del data[position:]
    else:
        data[position] = value
    path.write_bytes(bytes(data))
    with contextlib.suppress(LeRobotError):
        loaded = open_set(root)
        for row in range(len(loaded)):
            loaded.image("base_0_rgb", row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def paths_in(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [here] * bool(here) + [path for key, child in children for path in paths_in(child, (*here, key))]


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["info.json", "episodes.jsonl", "tasks.jsonl"]),
    which=st.integers(0, 1000),
    value=JSON,
    drop=st.booleans(),
)
def test_lies_in_the_meta_folder_give_a_clear_error_or_the_same_numbers(name: str, which: int, value: Any, drop: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = sets.write(Path(folder) / "set", (3, 4))
        path = root / "meta" / name
        document = (
            [json.loads(line) for line in path.read_text().splitlines()] if name != "info.json" else json.loads(path.read_text())
        )
        places = paths_in(document)
        *parents, last = places[which % len(places)]
        node = document
        for key in parents:
            node = node[key]
        if drop:
            del node[last]
        else:
            node[last] = value
        path.write_text(json.dumps(document) if name == "info.json" else "\n".join(map(json.dumps, document)))
        try:
            loaded = open_set(root)
        except LeRobotError:
            return
        written = sets.episodes((3, 4))
        for i, episode in enumerate(loaded.episodes):
            np.testing.assert_array_equal(loaded.actions[loaded.episode_slice(i)], written[episode.index].actions)


# Pages


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.none() | st.binary(max_size=40) | st.just(b"the same"), min_size=1, max_size=40),
    st.sampled_from(["snappy", "zstd", "gzip", "none", "brotli", "lz4"]),
    st.booleans(),
    st.sampled_from(["1.0", "2.0"]),
    st.sampled_from([3, 1000]),
    st.sampled_from([64, 1 << 20]),
)
def test_pages_agree_with_arrow(
    values: list[bytes | None], compression: str, dictionary: bool, version: str, group: int, page: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        structs = pa.array([None if value is None else {"bytes": value or None, "path": "p"} for value in values], kind)
        plain = pa.array(values, pa.binary())
        pq.write_table(
            pa.table({"image": structs, "plain": plain}),
            path,
            compression=compression,
            use_dictionary=dictionary,
            data_page_version=version,
            row_group_size=group,
            data_page_size=page,
            dictionary_pagesize_limit=200,
        )
        for leaf, expected in (("plain", values), ("image.bytes", [value or None for value in values])):
            column = ByteColumn(path, leaf, PageCache())
            assert [column.read(row) for row in range(len(column))] == expected
            assert column._arrow_only == (compression == "lz4")


def test_page_cache_is_bounded() -> None:
    cache = PageCache(max_bytes=10)
    for key in range(5):
        cache.put(key, str(key), 4)
    assert [cache.get(key) for key in range(5)] == [None, None, None, "3", "4"]
    cache.get(3)
    cache.put(5, "5", 4)
    assert cache.get(3) == "3"
    assert cache.get(4) is None


# Video


def write_video(path: Path, images: Iterable[np.ndarray]) -> None:
    """A lossless video at 10 frames per second with a key frame every 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0", "g": "3"})
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb24"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def as_video(root: Path, lengths: tuple[int, ...]) -> None:
    """Move the camera ``image`` of a v2.1 set into one video per episode."""
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["image"]["dtype"] = "video"
    sets.edit_info(
        root, features=info["features"], video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    )
    for i, episode in enumerate(sets.episodes(lengths)):
        sets.edit_table(sets.episode_file(root, i), image=None)
        write_video(root / f"videos/chunk-000/image/episode_{i:06d}.mp4", np.asarray(episode.images["image"]))


def test_video_columns(root: Path) -> None:
    as_video(root, sets.LENGTHS)
    check_content(open_set(root), sets.episodes())
    (root / "videos/chunk-000/image/episode_000001.mp4").unlink()
    with pytest.raises(LeRobotError, match=r"episode_000001.mp4: is missing \(video of episode 1, image\)"):
        open_set(root)


def test_video_shared_by_episodes(root: Path, tmp_path: Path) -> None:
    """v3.0: one file for all episodes, each from its own timestamp on."""
    v30 = sets.as_v30(root, tmp_path / "v30")
    info = json.loads((v30 / "meta/info.json").read_text())
    info["features"]["image"] |= {"dtype": "video", "shape": [3, 16, 16]}
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    sets.edit_info(v30, features=info["features"], video_path=template)
    sets.edit_table(v30 / "data/chunk-000/file-000.parquet", image=None)
    path = v30 / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        place = {"chunk_index": 0, "file_index": 0, "from_timestamp": row["dataset_from_index"] / 10}
        row |= {f"videos/image/{key}": value for key, value in place.items()}
    pq.write_table(pa.Table.from_pylist(rows), path)
    frames = [image for episode in sets.episodes() for image in np.asarray(episode.images["image"])]
    write_video(v30 / "videos/image/chunk-000/file-000.mp4", frames)
    check_content(open_set(v30), sets.episodes())
    write_video(v30 / "videos/image/chunk-000/file-000.mp4", frames[:9])
    with pytest.raises(LeRobotError, match=r"file-000.mp4: image of episode 1, frame 6 .*the nearest is 0.8 s"):
        open_set(v30).image("base_0_rgb", 11)


def test_reading_imports_neither_torch_nor_lerobot(root: Path) -> None:
    code = f"""
import sys
from fusevla.data.lerobot import open_set
open_set({str(root)!r}).image("base_0_rgb", 0)
assert not {{"torch", "lerobot", "datasets", "av"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
