"""The cache of compiled programs: used by a second process, the user's own left alone, never a reason to fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, jax, jax.numpy as jnp, numpy as np
from fusevla import compile_cache
compile_cache.MIN_SECONDS = 0.0
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
folder = compile_cache.use_compile_cache()
step = jax.jit(lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(w @ c), c.sum()), x[0], x))
value = step(jnp.linspace(0, 1, 3 * 64 * 64, dtype=jnp.float32).reshape(3, 64, 64))
bits = [np.asarray(leaf).tobytes().hex() for leaf in value]
count = {name: events.count(name) for name in ("cache_hits", "cache_misses")}
print(json.dumps({"folder": folder and str(folder), "bits": bits, **count}))
"""


def run(cache: Path, **more: str) -> tuple[dict, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment = {**clean, "FUSEVLA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*-cache")}


def test_a_second_process_compiles_nothing_and_computes_the_same_bits(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    kept = files(tmp_path)
    assert first["cache_misses"] == len(kept) > 0
    assert Path(first["folder"]).parent == tmp_path / "xla"  # below it, a folder for this kind of CPU
    assert Path(first["folder"]).stat().st_mode & 0o077 == 0
    second, said = run(tmp_path)
    assert second["cache_misses"] == 0
    assert second["cache_hits"] == len(kept)
    assert files(tmp_path) == kept
    assert second["bits"] == first["bits"]
    assert "Warning" not in said


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result, said = run(tmp_path / "file")
    assert result["folder"] is None
    assert "compiled programs cannot be kept there" in said
    assert result["cache_hits"] == result["cache_misses"] == 0


def test_the_users_own_folder_is_kept(tmp_path: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result, _ = run(tmp_path / "ours", **own)
    assert result["folder"] == str(tmp_path / "own")
    assert result["cache_misses"] == len(files(tmp_path / "own")) > 0
    assert not (tmp_path / "ours").exists()
