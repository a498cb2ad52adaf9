"""Rotary position embedding, half-split layout (Su et al. 2021; openpi ``gemma.py::_apply_rope``@15a9616a)."""

import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Float, Int

MAX_WAVELENGTH = 10_000


def apply_rope(x: Float[Array, "b s n e"], positions: Int[Array, "b s"]) -> Float[Array, "b s n e"]:
    """Rotates each (i, i + e/2) pair of a head by ``position / 10000^(2i/e)``, in float32; returns ``x``'s dtype."""
    half = x.shape[-1] // 2
    timescale = MAX_WAVELENGTH ** (jnp.arange(half, dtype=jnp.float32) / half)
    # The barrier keeps XLA from dividing by multiplying with 1/timescale: one ulp at position 1,000 is 6e-5 radians.
    angle = positions[..., None].astype(jnp.float32) / jax.lax.optimization_barrier(
        jnp.broadcast_to(timescale, (*positions.shape, half))
    )
    angle = angle[:, :, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
