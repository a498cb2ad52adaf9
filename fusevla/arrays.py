"""Axis names and the two pytrees that cross module borders.

Axis names used in every annotation of the library:

===== ==========================================================
b     batch (samples)
s     sequence: every token that one attention call sees
q, k  query / key positions of one attention call
p     prefix-side tokens: images, then text
l     text tokens, padded to a length bucket
h     action horizon (steps)
a     action or state dimension
r     flow draws (noise, time) per sample
d     model width
n, m  query heads, key/value heads
e     head dimension
f     feed-forward width
v     vocabulary
===== ==========================================================
"""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8

__all__ = ["Array", "Batch", "Bool", "Float", "Int", "Key", "Observation", "UInt8"]

Array = jax.Array | np.ndarray
"""Host batches are NumPy, device batches are JAX; public functions accept both."""

Key = PRNGKeyArray


class Observation(eqx.Module):
    """What the policy sees: cameras, text tokens (with their masks) and the normalised state.

    ``images`` are uint8 in [0, 255] or float32 in [-1, 1], keyed by camera and ordered by name. A camera that no sample
    has is simply absent; one that single samples lack is masked. ``token_ar_mask`` is True where a token starts a new
    causal block (the suffix), False in the bidirectional prefix.
    """

    images: dict[str, UInt8[Array, "b height width 3"] | Float[Array, "b height width 3"]]
    image_masks: dict[str, Bool[Array, " b"]]
    state: Float[Array, "b a"]
    tokens: Int[Array, "b l"]
    token_mask: Bool[Array, "b l"]
    token_ar_mask: Bool[Array, "b l"]


class Batch(eqx.Module):
    """An observation with its training targets.

    ``token_loss_mask`` marks tokens that are *targets* of the text loss; ``diffusion_loss_mask`` the samples whose actions
    are trained; ``action_is_pad`` the steps beyond the end of an episode.
    """

    observation: Observation
    token_loss_mask: Bool[Array, "b l"]
    diffusion_loss_mask: Bool[Array, " b"]
    actions: Float[Array, "b h a"]
    action_is_pad: Bool[Array, "b h"]
