"""Where fetched and generated files are kept, and how a file gets written whole or not at all."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Ours: ``$FUSEVLA_CACHE``, by default ``~/.cache/fusevla``."""
    return Path(os.environ.get("FUSEVLA_CACHE") or "~/.cache/fusevla").expanduser()


def openpi_cache_folder() -> Path:
    """Where openpi keeps what it fetched: ``$OPENPI_DATA_HOME``, by default ``~/.cache/openpi``."""
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes beside the target and renames, so that nobody ever reads half a file; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
