"""Compiled programs are kept on disk: the second run of the same command compiles nothing that takes long."""

import hashlib
import platform
import tempfile
import warnings
from pathlib import Path

from fusevla.files import cache_folder

MAX_BYTES = 5 * 10**9
"""What is used least goes first."""
MIN_SECONDS = 1.0
"""What compiles faster is not worth a file."""


def use_compile_cache() -> Path | None:
    """Has JAX keep its executables below ``cache_folder()``; returns where, or None (and warns) where it cannot be written.

    JAX_COMPILATION_CACHE_DIR, where it is set, names the folder instead, and JAX_ENABLE_COMPILATION_CACHE=false turns all of
    it off. Call it in scripts, before the first compilation: it is a setting of the whole process.
    """
    import jax

    chosen: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen:
        return Path(chosen)
    folder = cache_folder() / "xla" / _machine(jax.default_backend())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # ours alone: what lies there is run as code
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warnings.warn(
            f"{folder}: compiled programs cannot be kept there ({error.strerror}), every run compiles anew; "
            "FUSEVLA_CACHE or JAX_COMPILATION_CACHE_DIR names another folder",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def _machine(backend: str) -> str:
    """A folder for each kind of CPU where programs are compiled for it; JAX's own keys tell accelerators apart.

    Code for one CPU may hold instructions that another lacks. JAX 0.10's keys differ by instruction set too (the topology's
    fingerprint), but its documentation does not promise that, and a home folder may be shared by many machines. On CPUs for
    which LLVM prefers no gathers, XLA's loader logs "+prefer-no-gather is not supported" for code of the very same machine
    (github.com/jax-ml/jax/issues/38445): noise, or at worst a compilation.
    """
    if backend != "cpu":
        return backend
    about, traits = Path("/proc/cpuinfo"), {platform.machine(), platform.processor()}
    if about.is_file():
        wanted = ("model name", "flags", "Features", "CPU part")
        traits |= {line for line in about.read_text().splitlines() if line.startswith(wanted)}
    return f"cpu-{hashlib.sha256(repr(sorted(traits)).encode()).hexdigest()[:12]}"
