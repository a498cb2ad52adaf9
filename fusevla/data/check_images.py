"""Decodes the images of a set to find the ones that cannot be used, before a training run does."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from fusevla.data.lerobot import LeRobotError, LeRobotSet

__all__ = ["Which", "image_count", "image_defects"]

Which = Literal["all", "sample", "none"]
"""Every image, some of every episode, or none."""
SAMPLED = 5
"""Frames of an episode and camera that ``sample`` decodes, first and last among them."""


def image_count(data: LeRobotSet, which: Which) -> int:
    """How many images ``image_defects`` looks at."""
    return sum(len(_frames(episode.length, which)) for episode in data.episodes) * len(data.cameras)


def image_defects(data: LeRobotSet, which: Which, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """One line for every image that is missing, damaged or of another size than announced; ``advance(n)`` as they are done."""
    if which == "none":
        return []
    scanned: dict[Path, np.ndarray | str] = {}
    defects: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in dict.fromkeys(span.path for i in range(len(data.episodes)) for span in data.videos(i).values()):
            scanned[path] = _scan(data, path) if path.is_file() else np.zeros(0)
        for found in pool.map(lambda i: _episode_defects(data, i, which, scanned, advance), range(len(data.episodes))):
            defects += found
    broken = [f"{path.relative_to(data.root)}: {problem}" for path, problem in scanned.items() if isinstance(problem, str)]
    return broken + defects


def _frames(length: int, which: Which) -> Sequence[int]:
    if which == "all":
        return range(length)
    return np.unique(np.linspace(0, length - 1, SAMPLED).round().astype(int)).tolist() if which == "sample" else []


def _scan(data: LeRobotSet, path: Path) -> np.ndarray | str:
    """The times of a video's frames, or what is wrong with it."""
    from fusevla.data.video import frame_times

    try:
        return frame_times(path)
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        if isinstance(error, MemoryError):
            raise
        return f"the video cannot be decoded ({type(error).__name__}: {error})."


def _episode_defects(
    data: LeRobotSet, i: int, which: Which, scanned: dict[Path, np.ndarray | str], advance: Callable[[int], None]
) -> list[str]:
    first, frames = data.episode_slice(i).start, _frames(data.episodes[i].length, which)
    videos, defects = data.videos(i), list[str]()
    for camera in data.cameras:
        in_video = camera in videos
        missing = [*_video_defects(data, i, camera, scanned[videos[camera].path])] if in_video else []
        defects += missing
        usable = not in_video or (not missing and not isinstance(scanned[videos[camera].path], str) and np.isfinite(data.fps))
        # of a video one frame tells the size: the rest was decoded with the file
        for frame in (frames[:1] if in_video else frames) if usable else ():
            try:
                data.image(camera, first + frame, strict=True)
            except LeRobotError as error:
                defects += error.defects
        advance(len(_frames(data.episodes[i].length, which)))
    return defects


def _video_defects(data: LeRobotSet, i: int, camera: str, times: np.ndarray | str) -> Iterator[str]:
    """Frames of the episode that its video does not show."""
    span, episode = data.videos(i)[camera], data.episodes[i]
    if isinstance(times, str) or not span.path.is_file():
        return  # reported by itself
    wanted = span.start + np.arange(episode.length) / data.fps
    if len(times):
        after = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
        near = np.stack([times[after - 1], times[np.minimum(after, len(times) - 1)]])
        absent = np.flatnonzero(np.abs(near - wanted).min(axis=0) > 0.5 / data.fps)
    else:
        absent = np.arange(episode.length)
    if len(absent):
        where = f"{span.path.relative_to(data.root)}: {data.cameras[camera]} of episode {episode.index}"
        yield f"{where}: a frame every {1 / data.fps:g} s expected, {len(absent)} are missing, the first is frame {absent[0]}."
