"""Closed-loop figures as a page: a table, films with their thoughts, and what went wrong."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusevla.evaluate.toy_rollout import Outcome
from fusevla.files import write_whole

__all__ = ["write_page"]

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1f2937}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e5e7eb}
.films{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}video{border:1px solid #e5e7eb;max-width:100%}
figcaption{max-width:30rem;font-size:.85rem}pre{white-space:pre-wrap;margin:0;font-size:.8rem}.bad{color:#b91c1c}"""


def write_page(
    path: Path, title: str, figures: Mapping[str, Any], films: Mapping[str, Outcome], outcomes: Sequence[Outcome]
) -> None:
    """One HTML file; ``films`` maps file names beside it to their episodes. Every text in it is escaped."""
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_value(value)}</td></tr>" for name, value in figures.items())
    shown = "".join(_film(name, outcome) for name, outcome in films.items())
    failed = "".join(_failure(outcome) for outcome in outcomes if not outcome.success)
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{_text(title)}</h1><table>{rows}</table><h2>Episodes</h2><div class='films'>{shown}</div>"
        f"<h2>Episodes that failed</h2><table><tr><th>seed</th><th>task</th><th>steps</th><th>grasped (thought at the time)</th>"
        f"<th>last thought</th></tr>{failed}</table></body></html>"
    )
    write_whole(path, page.encode())


def _film(name: str, outcome: Outcome) -> str:
    ending = "done" if outcome.success else "<span class='bad'>failed</span>"
    return (
        f"<figure><video src='{_text(name)}' controls loop muted width='320'></video>"
        f"<figcaption>seed {outcome.seed}, {ending} after {outcome.steps} steps: {_text(outcome.task)}</figcaption></figure>"
    )


def _failure(outcome: Outcome) -> str:
    grasps = "<br>".join(f"{_text(taken)} ({_text(named or 'none')})" for taken, named in outcome.grasps) or "nothing"
    last = outcome.thoughts[-1].text if outcome.thoughts else ""
    cells = (str(outcome.seed), _text(outcome.task), str(outcome.steps), grasps, f"<pre>{_text(last)}</pre>")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{_text(name)}: {_value(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, tuple | list):
        return " to ".join(_value(entry) for entry in value)
    return _text("-" if value is None else value)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
