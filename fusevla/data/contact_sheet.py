"""A picture of episodes: the frames where thoughts are due, with the thoughts under them."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusevla.data.annotations import Annotations, EpisodeAnnotation, Segment
from fusevla.data.lerobot import LeRobotSet

__all__ = ["draw_contact_sheet", "spread"]

EPISODES, COLUMNS = 8, 6
"""At most so many rows, and thoughts of an episode."""
CELL, GAP, TITLE, SPACING = 3.6, 0.12, 0.35, 0.125
"""Inches: a column, between columns, an episode's title, a line of text."""
LINE = 66
"""Characters."""


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
    rows = [_cells(frames, i, annotations) for i in shown]
    # in inches: a title, the pictures, the lines of the longest text
    pictures = [max(CELL * strip.shape[0] / strip.shape[1] for strip, _ in row) for row in rows]
    heights = [TITLE + tall + SPACING * max(text.count("\n") + 3 for _, text in row) for tall, row in zip(pictures, rows)]
    figure = Figure(figsize=((CELL + GAP) * max(len(row) for row in rows) + GAP, sum(heights)))
    width, height = figure.get_size_inches()
    top = height
    for i, row, tall, whole in zip(shown, rows, pictures, heights, strict=True):
        episode = frames.episodes[i]
        title = f"episode {episode.index}: {_short(episode.task, 100)}"
        figure.text(GAP / width, (top - TITLE / 2) / height, title, fontsize=10, va="center", parse_math=False)
        for column, (strip, text) in enumerate(row):
            left = (GAP + column * (CELL + GAP)) / width
            axes = figure.add_axes((left, (top - TITLE - tall) / height, CELL / width, tall / height))
            axes.imshow(strip)
            axes.set_axis_off()
            figure.text(left, (top - TITLE - tall - 0.05) / height, text, fontsize=7, va="top", parse_math=False)
        top -= whole
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text in scripts that the font lacks shows as boxes
        FigureCanvasAgg(figure).print_figure(path, dpi=100)


def _cells(frames: LeRobotSet, i: int, annotations: Annotations) -> list[tuple[np.ndarray, str]]:
    """(pictures of all cameras side by side, text) of each thought of an episode."""
    episode, first = frames.episodes[i], frames.episode_slice(i).start
    cells = []
    for frame, segment in _thoughts(annotations.episodes[episode.index], episode.length):
        images = [frames.image(camera, first + frame) for camera in frames.cameras]
        height = max(image.shape[0] for image in images)
        strip = [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0))) for image in images]
        lines = [f"frame {frame}"]
        for line in _short(segment.updated_content or "", 600).strip("\n").split("\n"):
            lines += textwrap.wrap(line, LINE) or [""]
        cells.append((np.concatenate(strip, axis=1), "\n".join(lines)))
    return cells


def _thoughts(annotation: EpisodeAnnotation, length: int) -> list[tuple[int, Segment]]:
    """(frame, segment) of the thoughts that are due, evenly thinned where there are too many."""
    due = [(min(segment.start_step, length - 1), segment) for segment in annotation.segments if segment.updated_content]
    chosen = np.unique(np.linspace(0, len(due) - 1, min(len(due), COLUMNS)).round().astype(int))
    return [due[k] for k in chosen]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
