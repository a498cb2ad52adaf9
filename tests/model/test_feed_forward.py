"""The feed-forward in pieces, as full rematerialisation runs it: the plain one, for less memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.model import gemma
from fusevla.model.gemma import ExpertLayer, init_expert
from fusevla.presets import ExpertConfig
from tests.tiny import tiny_model

LAYER: ExpertLayer = jax.tree.map(lambda leaf: leaf[0], tiny_model().language.layers)
"""With adapters; width 24."""


def loss(layer: ExpertLayer, x: jax.Array, remat: str) -> jax.Array:
    return jnp.sum(jnp.square(gemma._feed_forward(layer, x, remat)))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_pieces_are_the_plain_feed_forward_and_its_gradients(length, monkeypatch):
    monkeypatch.setattr(gemma, "PIECE", 4)
    x = jnp.asarray(np.random.default_rng(length).normal(size=(2, length, 24)).astype(np.float32))
    plain, pieces = (eqx.filter_jit(jax.value_and_grad(loss, argnums=(0, 1)))(LAYER, x, remat) for remat in ("none", "full"))
    for ours, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


def test_the_backward_pass_holds_activations_of_one_piece():
    """Compiled memory: the plain one has at least three arrays [b, s, mlp] at a time, pieces two pieces' worth of them."""
    batch, length, width, mlp = 2, 8 * gemma.PIECE, 16, 512
    config = ExpertConfig(width=width, depth=1, mlp_dim=mlp, num_heads=1, num_kv_heads=1, head_dim=8)
    layer = jax.tree.map(lambda leaf: leaf[0], init_expert(config, None, jax.random.key(0)).layers)
    x = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    activation = batch * length * mlp * 4

    def temporary(remat: str) -> int:
        gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=2)
        return int(gradient.lower(layer, x, remat).compile().memory_analysis().temp_size_in_bytes)

    assert temporary("full") < activation < 2 * activation < temporary("none")
