"""One function, several implementations: all equal to a loop over queries and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.model.attention import attention
from tests import references


def inputs(heads: int, kv_heads: int, dtype: str = "float32") -> tuple[list[jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, n, 8)).astype(np.float32) for length, n in ((5, heads), (7, kv_heads), (7, kv_heads)))
    mask = rng.random((2, 5, 7)) < 0.6
    mask[:, 0] = False
    mask[:, 1] = True
    return [jnp.asarray(x).astype(dtype) for x in (q, k, v)], jnp.asarray(mask)


@pytest.mark.parametrize("implementation", ["plain", "xla"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
def test_it_is_softmax_attention(implementation, heads, kv_heads):
    (q, k, v), mask = inputs(heads, kv_heads)
    ours = np.asarray(attention(q, k, v, mask, implementation))
    expected = references.attention(np.asarray(q), np.asarray(k), np.asarray(v), np.asarray(mask))
    sees = np.asarray(mask).any(axis=2)
    np.testing.assert_allclose(ours[sees], expected[sees], rtol=1e-5, atol=1e-6)
    assert np.isfinite(ours).all()  # a row that sees nothing is meaningless but never NaN


def test_without_a_mask_every_key_counts():
    (q, k, v), mask = inputs(4, 1)
    everything = jnp.ones_like(mask)
    for implementation in ("plain", "xla"):
        np.testing.assert_allclose(
            attention(q, k, v, None, implementation), attention(q, k, v, everything, "plain"), rtol=1e-5, atol=1e-6
        )


def test_the_fused_form_has_the_gradients_of_the_plain_one():
    (q, k, v), mask = inputs(4, 1)

    def loss(implementation, q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, mask, implementation))[:, 1:])

    for plain, fused in zip(*(jax.grad(loss, argnums=(1, 2, 3))(name, q, k, v) for name in ("plain", "xla")), strict=True):
        np.testing.assert_allclose(plain, fused, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_a_float32_softmax():
    (q, k, v), mask = inputs(4, 1, "bfloat16")
    plain, fused = attention(q, k, v, mask, "plain"), attention(q, k, v, mask, "xla")
    assert plain.dtype == fused.dtype == jnp.bfloat16
    np.testing.assert_allclose(plain.astype(jnp.float32), fused.astype(jnp.float32), rtol=2e-2, atol=2e-2)
