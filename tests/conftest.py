"""Set-up of every test: shape and type checks in the library, strict dtypes and ranks, the golden folder."""

import importlib.util
import os
import tarfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimisation passes they take half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("fusevla", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("fusevla", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fusevla")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """A folder of golden numbers (see its README)."""
    from tests.golden_set import find_golden

    return find_golden()


@pytest.fixture(scope="session")
def libero_sample() -> Path:
    """Real LIBERO frames with annotations; the test is skipped in a checkout without them."""
    folder = Path(__file__).parents[2] / "shared" / "libero_sample"
    if not folder.exists():
        pytest.skip("needs ../shared/libero_sample")
    return folder


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The simulator's assets: of the package, or beside the checkout; skipped where simulator or assets are missing."""
    from fusevla.evaluate.libero import _package

    if not all(importlib.util.find_spec(name) for name in ("libero", "robosuite", "bddl", "mujoco")):
        pytest.skip("needs the extra libero")
    if (_package() / "assets").exists():
        return None
    packed = Path(__file__).parents[2] / "shared" / "libero_assets.tar.gz"
    if not packed.exists():
        pytest.skip("needs LIBERO's assets in its package or ../shared/libero_assets.tar.gz")
    folder = tmp_path_factory.mktemp("assets")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder
