"""What a run was made with, and how much memory it took."""

import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def peak_memory() -> dict[str, int | None]:
    """Peak bytes of this process, and of its first device where that is known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": stats.get("peak_bytes_in_use", host), "peak_host_bytes": host}


def memory_limit() -> int | None:
    """Bytes that this process may take of its first device; on a CPU what it has taken and what is free. None: not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    free, own = _kilobytes("/proc/meminfo", "MemAvailable"), _kilobytes("/proc/self/status", "VmRSS")
    return None if free is None or own is None else (free + own) * 1024


def _kilobytes(file: str, name: str) -> int | None:
    """The number behind ``name:`` in a file of Linux; None on other systems."""
    lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
