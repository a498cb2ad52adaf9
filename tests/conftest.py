"""Set-up of every test: shape and type checks in the library, strict dtypes and ranks, the golden folder."""

import os
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
