"""Hypothesis strategies: values at fixed shapes, since every new shape compiles again."""

import numpy as np
from hypothesis import strategies as st

BATCH, TEXT = 2, 9


@st.composite
def text_masks(draw, batch: int = BATCH, length: int = TEXT) -> tuple[np.ndarray, np.ndarray]:
    """(valid, ar) as tokenising makes them: a prefix, a causal suffix (maybe none), padding at the end."""
    valid, ar = np.zeros((batch, length), bool), np.zeros((batch, length), bool)
    for row in range(batch):
        prefix = draw(st.integers(1, length))
        suffix = draw(st.integers(0, length - prefix))
        valid[row, : prefix + suffix] = True
        ar[row, prefix : prefix + suffix] = True
    return valid, ar


@st.composite
def any_masks(draw, batch: int = BATCH, length: int = TEXT) -> tuple[np.ndarray, np.ndarray]:
    """(valid, ar) without any structure."""
    bits = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    first, second = (np.array(draw(bits)).reshape(batch, length) for _ in range(2))
    return first, second


def seeds() -> st.SearchStrategy[int]:
    """Seeds for numbers whose values do not matter one by one."""
    return st.integers(0, 2**31 - 1)
