"""The report of a prepared set as one HTML page: figures, and episodes to browse with their frames and thoughts.

Self-contained: no script or style from elsewhere, pictures inside, every text of the set escaped.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fusevla.data.annotations import Annotations, Segment
from fusevla.data.contact_sheet import spread
from fusevla.data.lerobot import LeRobotSet
from fusevla.data.summary import segment_kind

__all__ = ["write_html"]

PICTURED = 40
"""Episodes shown with their frames; all others with their thoughts only."""
THUMBNAIL = 176
COLORS = {"think": "#d97706", "act": "#2563eb", "act, outdated thought": "#7c3aed"}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1f2937;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e5e7eb}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:flex;height:1rem;border-radius:3px;overflow:hidden;margin:.3rem 0}
details{border-top:1px solid #e5e7eb;padding:.4rem 0}summary{cursor:pointer}
.segment{display:flex;gap:.8rem;margin:.6rem 0;padding-left:.6rem;border-left:4px solid}
.segment img{display:inline-block;width:11rem;height:auto;border-radius:3px}pre{white-space:pre-wrap;margin:0;font-size:.85rem}
.warning{background:#fef3c7;padding:.2rem .6rem;margin:.2rem 0}input{font:inherit;padding:.3rem;width:20rem}
.key{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .8rem;vertical-align:-1px}
"""
FILTER = """
document.getElementById('find').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase();
  for (const item of document.querySelectorAll('details')) item.hidden = !item.textContent.toLowerCase().includes(wanted);
});
"""


def write_html(
    path: Path,
    name: str,
    summary: Mapping[str, Any],
    warnings: Sequence[str],
    frames: LeRobotSet,
    positions: Sequence[int],
    annotations: Annotations,
) -> None:
    """Writes the page. ``positions`` are the episodes that are used, ``name`` the set's."""
    pictured = set(spread(frames, positions, PICTURED))
    parts = [
        f"<h1>{_e(name)}</h1>",
        "".join(f'<p class="warning">{_e(warning)}</p>' for warning in warnings),
        *_figures(summary),
        f"<h2>Episodes</h2><p>{_key()} &nbsp; <input id='find' placeholder='find in tasks and thoughts'></p>",
        f"<p>{len(pictured)} of {len(positions)} episodes with their frames.</p>" if len(pictured) < len(positions) else "",
        *(_episode(frames, i, annotations, i in pictured) for i in positions),
    ]
    head = f"<meta charset='utf-8'><title>{_e(name)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}<script>{FILTER}</script></body></html>"
    path.write_text(page, encoding="utf-8")


def _e(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers are set flush right."""
    cells = [
        "".join(f'<td class="n">{cell:,}</td>' if isinstance(cell, int) else f"<td>{_e(cell)}</td>" for cell in row)
        for row in rows
    ]
    header = "".join(f"<th>{_e(title)}</th>" for title in head)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _figures(summary: Mapping[str, Any]) -> list[str]:
    samples, text, state = summary["samples_per_epoch"], summary["text"], summary["state"]
    total = sum(samples["expected"].values())
    shares = [(kind, f"{count:,.1f}", f"{count / total:.2%}") for kind, count in samples["expected"].items()]
    degenerate = ", ".join(f"{name} {found or 'none'}" for name, found in summary["degenerate_dimensions"].items())
    return [
        f"<p>LeRobot {_e(summary['version'])}, {summary['episodes']:,} episodes, {summary['frames']:,} frames at "
        f"{summary['fps']:g} per second ({summary['frames'] / summary['fps'] / 60:,.1f} minutes), {len(summary['tasks'])} tasks; "
        f"cameras {_e(', '.join(f'{camera} = {column}' for camera, column in summary['cameras'].items()))}.</p>",
        "<h2>Samples of an epoch</h2>",
        f"<p>Expected: {samples['share']['reason']:.1%} reason, {samples['share']['act']:.1%} act "
        f"({samples['share']['stay']:.2%} stand still at the end).</p>",
        _table(("kind", "samples", "share"), shares),
        "<h2>Segments</h2>",
        _table(("kind", "segments", "frames"), ((k, v["segments"], v["frames"]) for k, v in summary["segments"].items())),
        "<h2>Lengths in tokens</h2>",
        f"<p>Tokenizer: {_e(text['tokenizer'])}. Limit {text['max_token_len']}; {text['distinct_thoughts']:,} distinct thoughts, "
        f"{text['thoughts_over_limit']:,} of them longer ({text['share_over_limit']:.2%} of the samples). Longest: "
        f"{_e(', '.join(f'{kind} {length}' for kind, length in text['longest'].items()))}.</p>",
        _histogram(text["histogram"]["edges"], text["histogram"]["samples"], text["max_token_len"]),
        "<h2>State</h2><p>Share of the frames in which a dimension lies outside the 256 bins after normalisation.</p>",
        _table(("dimension", "clipped"), ((str(d), f"{share:.2%}") for d, share in enumerate(state["clipped_share"]))),
        f"<p>Dimensions without spread: {_e(degenerate)}.</p>",
        "<h2>Tasks</h2>",
        _table(("task", "episodes", "frames"), ((t["task"], t["episodes"], t["frames"]) for t in summary["tasks"])),
    ]


def _histogram(edges: Sequence[int], counts: Sequence[float], limit: int) -> str:
    """An SVG: bars of expected samples on a root scale (rare long texts stay visible), and the limit as a line."""
    width, height, top = 760, 170, max(max(counts), 1)
    scale = width / edges[-1]
    bars = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        tall = (count / top) ** 0.5 * height
        title = f"<title>{low} to {high - 1} tokens: {count:,.1f} samples</title>"
        place = f'x="{low * scale:.1f}" y="{height - tall:.1f}" width="{(high - low) * scale - 1:.1f}" height="{tall:.1f}"'
        bars.append(f'<rect {place} fill="#2563eb">{title}</rect>')
    ticks = [f'<text x="{e * scale:.0f}" y="{height + 15}" text-anchor="middle">{e}</text>' for e in edges[::4]]
    x = limit * scale
    line = f'<path d="M{x:.1f} 0V{height}" stroke="#dc2626"/><text x="{x - 4:.1f}" y="12" text-anchor="end">limit</text>'
    axis = f'<path d="M0 {height}H{width}" stroke="#9ca3af"/>'
    note = f'<text x="0" y="{height + 30}">tokens; heights are square roots of expected samples</text>'
    return (
        f'<svg viewBox="-12 0 {width + 24} {height + 36}" width="{width}">{"".join(bars)}{axis}{line}{"".join(ticks)}{note}</svg>'
    )


def _key() -> str:
    return "".join(f'<span class="key" style="background:{color}"></span>{_e(kind)}' for kind, color in COLORS.items())


def _episode(frames: LeRobotSet, i: int, annotations: Annotations, pictures: bool) -> str:
    episode = frames.episodes[i]
    segments = annotations.episodes[episode.index].segments
    note = " (vision-language: only thinks)" if episode.index in annotations.vision_language else ""
    title = f"<b>{episode.index}</b> {_e(episode.task)}, {episode.length} frames, {len(segments)} segments{note}"
    bar = "".join(
        f'<span style="flex:{max(0, s.end(episode.length) - s.start_step)};background:{COLORS[segment_kind(s)]}"></span>'
        for s in segments
    )
    inside = "".join(_segment(frames, i, number, segment, pictures) for number, segment in enumerate(segments))
    return f'<details><summary>{title}</summary><div class="bar">{bar}</div>{inside}</details>'


def _segment(frames: LeRobotSet, i: int, number: int, segment: Segment, pictures: bool) -> str:
    length, kind = frames.episodes[i].length, segment_kind(segment)
    last = segment.end(length) - 1
    cameras = frames.cameras if pictures else ()
    images = "".join(_thumbnail(frames, camera, i, min(segment.start_step, length - 1)) for camera in cameras)
    texts = {"thinks": segment.updated_content, "prompt": segment.content, "outdated prompt": segment.outdated_content}
    shown = "".join(f"<p><i>{name}</i></p><pre>{_e(text)}</pre>" for name, text in texts.items() if text is not None)
    head = f"<b>{_e(kind)}</b> segment {number}, frames {segment.start_step} to {last}"
    left = f"<div style='flex:none'>{images}</div>" if pictures else ""
    return f'<div class="segment" style="border-color:{COLORS[kind]}">{left}<div>{head}{shown}</div></div>'


def _thumbnail(frames: LeRobotSet, camera: str, i: int, frame: int) -> str:
    image = Image.fromarray(frames.image(camera, frames.episode_slice(i).start + frame))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_e(camera)}, frame {frame}" src="data:image/jpeg;base64,{data}" loading="lazy"> '
