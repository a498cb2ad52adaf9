"""Where a checkpoint lies: a ``params`` folder, its parent, or a URL that is fetched once into a cache."""

import shutil
from pathlib import Path

from fusevla.files import cache_folder


class CheckpointError(ValueError):
    """A checkpoint that is not there, not of its kind, not the model's, incomplete or damaged. The message says all of it."""


def find_params(path: str | Path) -> Path:
    """The local ``params`` folder meant by ``path``: itself, its ``params`` folder, or a fetched copy of a URL.

    Raises ``CheckpointError`` with what was looked for and what lies there instead.
    """
    if "://" in str(path):
        return find_params(fetch(str(path)))
    folder = Path(path).expanduser().absolute()
    for candidate in (folder, folder / "params"):
        if (candidate / "_METADATA").is_file():
            return candidate
    raise CheckpointError(
        f"{folder}: not an openpi checkpoint. Expected a folder `params` (with _METADATA in it) or its parent; {_found(folder)}"
    )


def _found(folder: Path) -> str:
    if not folder.exists():
        return "there is nothing of that name."
    if not folder.is_dir():
        return "this is a file."
    nested = sorted(str(found.parent) for found in folder.glob("*/params/_METADATA"))
    if nested:
        return f"did you mean {' or '.join(nested)}?"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"this folder holds {', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}."


def fetch(url: str) -> Path:
    """Copies a folder behind a URL (``gs://``, ``https://``, ... : fsspec) into the cache, once; returns the copy.

    A copy that was interrupted is never taken for a complete one. Raises ``CheckpointError`` without the protocol's
    package or without a network, saying how to bring the files here by hand.
    """
    protocol, name = url.rstrip("/").split("://", 1)
    target = cache_folder() / protocol / name
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        _copy(protocol, name, partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_unreachable(url, target, error)) from error
    partial.rename(target)
    return target


def _copy(protocol: str, name: str, target: Path) -> None:
    import fsspec

    public = {"token": "anon"} if protocol in ("gs", "gcs") else {}
    files = fsspec.filesystem(protocol, **public)
    if not files.exists(name):
        raise FileNotFoundError(f"no such folder: {name}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files.get(f"{name}/", f"{target}/", recursive=True)


def _unreachable(url: str, target: Path, error: Exception) -> str:
    remedy = (
        "install the protocol's package (python -m pip install gcsfs, for gs://)"
        if isinstance(error, ImportError)
        else f"with a network this works by itself; without one, copy the folder from another machine to {target} "
        "(or anywhere, and give that path)"
    )
    return f"{url}: cannot be fetched ({type(error).__name__}: {str(error)[:300]}).\n  Remedy: {remedy}"
