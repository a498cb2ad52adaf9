"""Puts a prepared set in place: the files of the source, annotations, statistics and reports, all of it or nothing.

The source is only read. The result is built beside its place and renamed, so that a folder of that name is always complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import fusevla

__all__ = [
    "PrepareError",
    "Way",
    "complete_report",
    "copy_set",
    "file_sizes",
    "input_digest",
    "occupied",
    "source_files",
    "staged",
    "write_json",
]

Way = Literal["copy", "link"]
"""``link`` makes hard links: no room and no time, but a file that is later changed in place changes in both folders."""
REPORTS = ("report.json", "report.html", "contact_sheet.png")
OWN = (*REPORTS, "cot_simple.json", "norm_stats.json")
"""What the result has in its top folder and does not take from the source's."""


class PrepareError(ValueError):
    """A request that cannot be carried out as it stands."""


def source_files(root: Path) -> list[Path]:
    """The set's files relative to ``root``, ascending; without hidden ones and what a result makes anew."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        # a link back to a folder above it would be walked for ever
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [(here / name).relative_to(root) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if str(path) not in OWN and (root / path).is_file())


def input_digest(root: Path, files: Sequence[Path], annotations: Path, settings: Mapping[str, Any]) -> str:
    """Digest of what a result is made of: names, sizes and times of the files, the annotations' bytes, the settings."""
    digest = hashlib.sha256(annotations.read_bytes())
    digest.update(json.dumps([fusevla.__version__, dict(settings)], sort_keys=True).encode())
    for path in files:
        stat = (root / path).stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def complete_report(out: Path, digest: str) -> dict[str, Any] | None:
    """report.json of a result of the same input with all its files; None where it is to be made (again)."""
    report = _read_report(out)
    if report is None or report.get("input", {}).get("digest") != digest:
        return None
    sizes = report.get("files", {})
    intact = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items())
    return report if intact else None


def occupied(out: Path) -> bool:
    """Whether something else than a result lies at ``out``: it is never replaced."""
    return out.exists() and (not out.is_dir() or (any(out.iterdir()) and _read_report(out) is None))


def _read_report(out: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    mark = report.get("input") if isinstance(report, dict) else None
    return report if isinstance(mark, dict) and "digest" in mark and isinstance(report.get("files"), dict) else None


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the block ends, and vanishes when it fails.

    Raises:
        OSError: no room, or no right to write there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("partial", "partial-old"))
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def copy_set(root: Path, files: Collection[Path], out: Path, way: Way, advance: Callable[[int], None]) -> None:
    """The files into ``out``, writable; ``advance`` is called with the bytes of each."""
    for path in files:
        source, target = root / path, out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if way == "link":
            _link(source, target)
        else:
            shutil.copyfile(source, target)
        advance(source.stat().st_size)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise PrepareError(f"{source} cannot be linked to {target} ({error.strerror}); use --way copy") from error


def write_json(path: Path, document: Any) -> None:
    """``document`` as an indented file."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below ``folder``."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
