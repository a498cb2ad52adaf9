"""Closed-loop figures for people: a page with tables, films and what went wrong, and success as pictures."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusevla.evaluate.outcome import Outcome
from fusevla.files import write_whole

__all__ = ["plot_curve", "plot_tasks", "write_page"]

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1f2937}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}img{max-width:100%}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e5e7eb}
.films{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}video{border:1px solid #e5e7eb;max-width:100%}
figcaption{max-width:30rem;font-size:.85rem}pre{white-space:pre-wrap;margin:0;font-size:.8rem}.bad{color:#b91c1c}"""
MAX_FAILURES = 200


def write_page(
    path: Path, title: str, figures: Mapping[str, Any], outcomes: Sequence[Outcome], pictures: Sequence[str] = ()
) -> None:
    """One HTML file; ``pictures`` and the outcomes' films lie beside it. Every text in it is escaped."""
    tasks = "".join(_task(name, values) for name, values in figures.get("per_task", {}).items())
    rest = {name: value for name, value in figures.items() if name not in ("per_task", "curve")}
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_value(value)}</td></tr>" for name, value in rest.items())
    shown = "".join(_film(outcome) for outcome in outcomes if outcome.film)
    images = "".join(f"<p><img src='{_text(name)}' alt='{_text(name)}'></p>" for name in pictures)
    missed = [outcome for outcome in outcomes if not outcome.success and outcome.ticket.swap is None]
    failed = "".join(map(_failure, missed[:MAX_FAILURES]))
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{_text(title)}</h1><table>{rows}</table><h2>Per task</h2>{images}"
        f"<table><tr><th>task</th><th>episodes</th><th>success</th><th>95% interval</th></tr>{tasks}</table>"
        f"<h2>Films</h2><div class='films'>{shown}</div>"
        f"<h2>Episodes that failed ({len(missed)}{', the first are' if len(missed) > MAX_FAILURES else ''})</h2>"
        f"<table><tr><th>episode</th><th>task</th><th>steps</th><th>grasped (thought at the time)</th><th>last thought</th></tr>"
        f"{failed}</table></body></html>"
    )
    write_whole(path, page.encode())


def plot_tasks(figures: Mapping[str, Any], path: Path) -> None:
    """Writes ``path``: success of each task with its 95% interval. ``figures`` as from ``summarize``."""
    tasks = figures["per_task"]
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(tasks)), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(tasks))[::-1]
    axes.barh(places, [task["success"] for task in tasks.values()], color="tab:blue", alpha=0.35)
    for place, task in zip(places, tasks.values(), strict=True):
        axes.plot(task["success_interval"], [place, place], color="tab:blue", linewidth=2)
    axes.set_yticks(places, [_short(f"{name} ({task['episodes']})") for name, task in tasks.items()], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("success (line: 95% interval)", fontsize=9)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def plot_curve(curve: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes ``path``: success over training steps with its 95% interval; ``curve`` has step, success, success_interval."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, steps = figure.subplots(), [point["step"] for point in curve]
    low, high = zip(*(point["success_interval"] for point in curve), strict=True)
    axes.vlines(steps, low, high, color="tab:blue", alpha=0.35, linewidth=4, label="95% interval")
    axes.plot(steps, [point["success"] for point in curve], "o-", color="tab:blue", label="success")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def _task(name: str, values: Mapping[str, Any]) -> str:
    cells = (_text(name), str(values["episodes"]), _value(values["success"]), _value(values["success_interval"]))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _film(outcome: Outcome) -> str:
    ending = "done" if outcome.success else "<span class='bad'>failed</span>"
    swap = f", its first thought made to name the {_text(outcome.swapped_to)}" if outcome.swapped_to else ""
    return (
        f"<figure><video src='{_text(outcome.film)}' controls loop muted width='480'></video><figcaption>"
        f"{_text(outcome.ticket.name)}, {ending} after {outcome.steps} steps: {_text(outcome.task)}{swap}</figcaption></figure>"
    )


def _failure(outcome: Outcome) -> str:
    grasps = "<br>".join(f"{_text(taken)} ({_text(named or 'none')})" for taken, named in outcome.grasps) or "nothing"
    last = outcome.thoughts[-1].text if outcome.thoughts else ""
    cells = (outcome.ticket.name, _text(outcome.task), str(outcome.steps), grasps, f"<pre>{_text(last)}</pre>")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        between = "<br>" if any(isinstance(entry, Mapping) for entry in value.values()) else ", "
        return between.join(f"{_text(name)}: {_value(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, tuple | list):
        return " to ".join(_value(entry) for entry in value)
    return _text("-" if value is None else value)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
