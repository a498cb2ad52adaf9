"""Pictures of a run: its loss curves, and one batch as the model sees it."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fusevla.arrays import Batch
from fusevla.tokens.tokenizer import Tokenizer

TEXT_COLUMNS = 64
CURVES = (("loss", "loss (joint)"), ("text_loss", "text loss"), ("action_loss", "action loss"), ("grad_norm", "gradient norm"))


def plot_losses(rows: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes ``path``: the logged values of each step, their running mean, and the held-out ones.

    ``rows`` are the lines of metrics.jsonl, ``validation`` those of validation.jsonl.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True).flat, CURVES, strict=True):
        _curve(axes, rows, validation, name)
        axes.set_title(title, fontsize=11, loc="left")
    figure.supxlabel("step", fontsize=10)
    _save(figure, path)


def _points(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    table = np.array(pairs, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _curve(axes: Axes, rows: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], name: str) -> None:
    steps, values = _points(rows, name)
    window = max(1, len(values) // 20)
    smoothed = window > 1
    axes.plot(steps, values, color="tab:blue", alpha=0.35 if smoothed else 1.0, linewidth=1, label="batch")
    if smoothed:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {window}")
    held_steps, held_values = _points(validation, name)
    if held_values.size:
        axes.plot(held_steps, held_values, "o--", color="tab:orange", markersize=5, label="held out")
    if values.size and values.min() > 0 and values.max() / values.min() > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if values.size or held_values.size:
        axes.legend(fontsize=8, frameon=False)


def plot_batch(batch: Batch, tokenizer: Tokenizer, path: Path, limit: int = 4) -> None:
    """Writes ``path``: up to ``limit`` samples with their cameras (after augmentation), prompt, target text and actions.

    Images are float32 in [-1, 1] or uint8; all arrays of ``batch`` are on the host.
    """
    cameras = sorted(batch.observation.images)
    samples = shown(batch, limit)
    count = len(samples)
    figure = Figure(figsize=(3.1 * len(cameras) + 9.2, 3.3 * count), layout="constrained")
    widths = [1.0] * len(cameras) + [1.75, 1.15]
    grid = figure.subplots(count, len(widths), width_ratios=widths, squeeze=False)
    for sample, row in zip(samples, grid, strict=True):
        for camera, axes in zip(cameras, row, strict=False):
            _show_image(axes, batch, camera, sample)
        _show_text(row[-2], batch, tokenizer, sample)
        _show_actions(row[-1], batch, sample)
    _save(figure, path)


def shown(batch: Batch, limit: int) -> list[int]:
    """Up to ``limit`` samples of both kinds, as evenly as the batch has them: those that act, and those that think."""
    acts = np.asarray(batch.diffusion_loss_mask)
    kinds = np.flatnonzero(acts).tolist(), np.flatnonzero(~acts).tolist()
    ranked = sorted((rank, sample) for kind in kinds for rank, sample in enumerate(kind))
    return sorted(sample for _, sample in ranked[:limit])


def _show_image(axes: Axes, batch: Batch, camera: str, sample: int) -> None:
    image = np.asarray(batch.observation.images[camera][sample])
    if image.dtype != np.uint8:
        image = np.clip((image + 1) / 2, 0, 1)
    axes.imshow(image)
    there = bool(batch.observation.image_masks[camera][sample])
    axes.set_title(camera if there else f"{camera} (masked)", fontsize=9)
    axes.set_axis_off()


def _wrap(text: str) -> str:
    """Newlines stay visible: they are tokens."""
    lines = text.replace("\n", "⏎\n").split("\n")
    wrapped = (part for line in lines for part in textwrap.wrap(line, TEXT_COLUMNS, drop_whitespace=False) or [""])
    return "\n".join(wrapped)


def describe(batch: Batch, tokenizer: Tokenizer, sample: int) -> tuple[str, str, str]:
    """(prompt, target, note) of one sample, decoded from the very tokens that the model gets."""
    observation = batch.observation
    tokens, valid, causal = (
        np.asarray(x)[sample] for x in (observation.tokens, observation.token_mask, observation.token_ar_mask)
    )
    prompt, suffix = tokens[valid & ~causal], tokens[valid & causal]
    acts = tokenizer.ids.boa in suffix.tolist()
    target = "ACT" if acts else tokenizer.decode(suffix.tolist())
    supervised = int(np.asarray(batch.token_loss_mask)[sample].sum())
    note = f"{int(valid.sum())} tokens, {supervised} supervised" + (
        ", actions trained" if batch.diffusion_loss_mask[sample] else ""
    )
    return tokenizer.decode(prompt.tolist()), target, note


def _show_text(axes: Axes, batch: Batch, tokenizer: Tokenizer, sample: int) -> None:
    prompt, target, note = describe(batch, tokenizer, sample)
    axes.set_axis_off()
    text = f"PROMPT\n{_wrap(prompt)}\n\nTARGET\n{_wrap(target)}"
    options: dict[str, Any] = {"va": "top", "ha": "left", "family": "monospace", "transform": axes.transAxes, "parse_math": False}
    axes.text(0.0, 1.0, text, fontsize=8.5, linespacing=1.15, **options)
    axes.set_title(note, fontsize=9, loc="left")


def _show_actions(axes: Axes, batch: Batch, sample: int) -> None:
    actions, is_pad = np.asarray(batch.actions)[sample], np.asarray(batch.action_is_pad)[sample]
    used = np.flatnonzero(np.abs(np.asarray(batch.actions)).max(axis=(0, 1)) > 0)
    for dimension in used:
        axes.plot(actions[:, dimension], linewidth=1.2, marker=".", markersize=3, label=str(dimension))
    if is_pad.any():
        axes.axvspan(float(np.argmax(is_pad)) - 0.5, len(is_pad) - 0.5, color="0.85", zorder=0)
    axes.set_title("actions (normalised)" + (", grey: past the end" if is_pad.any() else ""), fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    if used.size:
        axes.legend(fontsize=6, ncols=4, frameon=False, title="dimension", title_fontsize=6)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
