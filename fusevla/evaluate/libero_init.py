"""The initial states of LIBERO's tasks, read from published pickles that are not trusted."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from fusevla.arrays import Float

__all__ = ["read_init_states"]


def read_init_states(path: Path) -> Float[np.ndarray, "n d"]:
    """The flattened simulator states of a ``.pruned_init`` file; nothing in the file is ever executed.

    Raises:
        ValueError: the file is missing, damaged, or holds anything besides one matrix of finite numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            states = _ArrayUnpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
    except Exception as error:  # a pickle of unknown origin may fail in any way
        raise ValueError(f"{path}: not a readable file of initial states ({error}); install hf-libero again") from error
    if not (isinstance(states, np.ndarray) and states.dtype.kind == "f" and states.ndim == 2 and np.isfinite(states).all()):
        raise ValueError(f"{path}: expected one matrix of finite numbers, got {type(states).__name__}; install hf-libero again")
    return states


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays of numbers and nothing else."""

    _known: Final[Mapping[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._known[module, name]
