"""The image tower: SigLIP So400m/14 without pooling (Zhai et al. 2023; openpi ``siglip.py``@15a9616a)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fusevla.arrays import Array, Float, Key
from fusevla.model.attention import Implementation, attention
from fusevla.model.layers import Dense, LayerNorm, checkpointed, lecun_normal, like
from fusevla.model.storage import restore
from fusevla.presets import Remat, VisionConfig


class Projection(eqx.Module):
    """An affine map between the model axis and (heads, head_dim) axes."""

    kernel: Float[Array, "..."]
    bias: Float[Array, "..."]

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``einsum(equation, x, kernel) + bias`` in x's dtype."""
        y = jnp.einsum(equation, x, self.kernel.astype(x.dtype))
        return y + like(self.bias, y)


class SelfAttention(eqx.Module):
    """Multi-head self-attention; q/k/v kernels [width, heads, head_dim], output [heads, head_dim, width]."""

    query: Projection
    key: Projection
    value: Projection
    out: Projection

    def __call__(self, x: Float[Array, "b s d"], implementation: Implementation, softmax_dtype: str) -> Float[Array, "b s d"]:
        """Every token attends to every token of its image."""
        q, k, v = (part("bsd,dne->bsne", x) for part in (self.query, self.key, self.value))
        return self.out("bsne,ned->bsd", attention(q * q.shape[-1] ** -0.5, k, v, None, implementation, softmax_dtype))


class Mlp(eqx.Module):
    """Two dense layers around a tanh-approximate gelu."""

    up: Dense
    down: Dense

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Maps each token."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class VisionLayer(eqx.Module):
    """One pre-norm transformer block; the tower stacks them on axis 0."""

    norm1: LayerNorm
    attn: SelfAttention
    norm2: LayerNorm
    mlp: Mlp

    def __call__(self, x: Float[Array, "b s d"], implementation: Implementation, softmax_dtype: str) -> Float[Array, "b s d"]:
        """Attention, then feed-forward, each with its residual."""
        x = x + self.attn(self.norm1(x), implementation, softmax_dtype)
        return x + self.mlp(self.norm2(x))


class SigLIP(eqx.Module):
    """Images to tokens of the language model's width. Patches and position embedding are float32, then cast."""

    patch: Projection
    position: Float[Array, "1 s d"]
    layers: VisionLayer
    norm: LayerNorm
    head: Dense

    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        dtype: str,
        implementation: Implementation,
        remat: Remat,
        softmax_dtype: str = "float32",
    ) -> Float[Array, "b s d_out"]:
        """Images are float32 in [-1, 1]; the result has the compute ``dtype``.

        The published patch convolution has stride equal to its size: a matrix product over flattened patches.
        """
        rows, columns = self.patch.kernel.shape[:2]
        patches = rearrange(images, "b (y r) (x c) i -> b (y x) r c i", r=rows, c=columns)
        x = (self.patch("bsrci,rcid->bsd", patches) + self.position.astype(jnp.float32)).astype(dtype)
        block = checkpointed(lambda x, layer: restore(layer)(x, implementation, softmax_dtype), remat)
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, self.layers)
        return self.head(self.norm(x))


def init_dense(key: Key, inputs: int, outputs: int) -> Dense:
    """Lecun-normal kernel, zero bias, float32."""
    return Dense(lecun_normal(key, (inputs, outputs), inputs), jnp.zeros(outputs))


def init_siglip(config: VisionConfig, out_width: int, key: Key) -> SigLIP:
    """A tower from scratch: matrices lecun-normal, biases zero, norms one, position embedding normal(1/sqrt(width))."""
    d, n, p = config.width, config.num_heads, config.patch_size
    patch_key, position_key, layers_key, head_key = jax.random.split(key, 4)
    return SigLIP(
        patch=Projection(lecun_normal(patch_key, (p, p, 3, d), p * p * 3), jnp.zeros(d)),
        position=lecun_normal(position_key, (1, config.num_tokens, d), d),
        layers=jax.vmap(lambda k: _init_layer(d, n, config.mlp_dim, k))(jax.random.split(layers_key, config.depth)),
        norm=LayerNorm(jnp.ones(d), jnp.zeros(d)),
        head=init_dense(head_key, d, out_width),
    )


def _init_layer(d: int, heads: int, mlp: int, key: Key) -> VisionLayer:
    e = d // heads
    q, k, v, out, up, down = jax.random.split(key, 6)
    project = lambda part: Projection(lecun_normal(part, (d, heads, e), d), jnp.zeros((heads, e)))
    attn = SelfAttention(project(q), project(k), project(v), Projection(lecun_normal(out, (heads, e, d), d), jnp.zeros(d)))
    norm = LayerNorm(jnp.ones(d), jnp.zeros(d))
    return VisionLayer(norm, attn, norm, Mlp(init_dense(up, d, mlp), init_dense(down, mlp, d)))
