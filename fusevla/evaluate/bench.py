"""How a benchmark ends: its figures in lines and, where wanted, as JSON; or what was wrong with the input."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusevla.files import write_whole

__all__ = ["publish", "show"]


def publish(run: Callable[[], Mapping[str, Any]], show: Callable[[Mapping[str, Any]], None], file: Path | None) -> None:
    """Shows what ``run`` returns and writes it to ``file``; a ValueError or OSError is one message and exit code 2."""
    try:
        figures = run()
    except (ValueError, OSError) as error:  # those of bad sets, checkpoints and requests are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(figures)
    if file is not None:
        write_whole(file, (json.dumps(figures, indent=2) + "\n").encode())


def show(figures: Mapping[str, Any]) -> None:
    """One line for every figure that there is."""
    for name, value in figures.items():
        if value is not None:
            print(f"{name:<48} {value:.4g}" if isinstance(value, float) else f"{name:<48} {value}")
