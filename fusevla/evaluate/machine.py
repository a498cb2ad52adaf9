"""What a run was made with, and how much memory it took."""

import platform
import resource
import sys
from importlib import metadata

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
