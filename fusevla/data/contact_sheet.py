"""A picture of episodes: the frames where thoughts are due, with the thoughts under them."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusevla.data.annotations import Annotations, EpisodeAnnotation, Segment
from fusevla.data.lerobot import LeRobotSet

__all__ = ["draw_contact_sheet", "spread"]

EPISODES, COLUMNS, LINE = 8, 6, 34


def spread(frames: LeRobotSet, positions: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the positions, ascending: one episode of every task before a second of any."""
    turns: dict[str, int] = {}
    order = []
    for i in positions:
        task = frames.episodes[i].task
        order.append((turns.setdefault(task, 0), i))
        turns[task] += 1
    return sorted(i for _, i in sorted(order)[:limit])


def draw_contact_sheet(path: Path, frames: LeRobotSet, positions: Sequence[int], annotations: Annotations) -> None:
    """Writes a PNG: a row per episode (some of ``positions``), a column per thought that is due in it."""
    shown = spread(frames, positions, EPISODES)
    rows = [_thoughts(annotations.episodes[frames.episodes[i].index], frames.episodes[i].length) for i in shown]
    width = max(len(row) for row in rows)
    figure = Figure(figsize=(2.9 * width + 0.2, 4.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), width, squeeze=False)
    for i, thoughts, line in zip(shown, rows, grid, strict=True):
        for axes in line:
            axes.set_axis_off()
        for (frame, segment), axes in zip(thoughts, line, strict=False):
            _draw(axes, frames, i, frame, segment)
        episode = frames.episodes[i]
        line[0].set_title(f"episode {episode.index}: {_short(episode.task, 60)}", fontsize=9, loc="left", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text in scripts that the font lacks shows as boxes
        FigureCanvasAgg(figure).print_figure(path, dpi=100)


def _thoughts(annotation: EpisodeAnnotation, length: int) -> list[tuple[int, Segment]]:
    """(frame, segment) of the thoughts that are due, evenly thinned where there are too many."""
    due = [(min(segment.start_step, length - 1), segment) for segment in annotation.segments if segment.updated_content]
    chosen = np.unique(np.linspace(0, len(due) - 1, min(len(due), COLUMNS)).round().astype(int))
    return [due[k] for k in chosen]


def _draw(axes: Axes, frames: LeRobotSet, i: int, frame: int, segment: Segment) -> None:
    row = frames.episode_slice(i).start + frame
    images = [frames.image(camera, row) for camera in frames.cameras]
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0))) for image in images]
    strip = np.concatenate(padded, axis=1)
    axes.imshow(strip)
    axes.set_anchor("N")
    text = "\n".join(part for line in (segment.updated_content or "").split("\n") for part in textwrap.wrap(line, 2 * LINE))
    axes.annotate(
        f"frame {frame}\n{_short(text, 600)}",
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(0, -4),
        textcoords="offset points",
        fontsize=6,
        va="top",
        parse_math=False,
        annotation_clip=False,
    )


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
