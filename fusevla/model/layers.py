"""The linear maps, norms and the embedding that SigLIP and Gemma are made of.

Every module holds arrays only (the rest is static), so that ``jax.jit``, ``lax.scan``, optax and orbax take it as it is.
Weights are cast to the dtype of their input at use: a frozen bfloat16 leaf never gets a lasting float32 copy. In training a
frozen matrix may be a ``storage.Stored`` in the array's place, which the checkpointed block reads back (``restore``).
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fusevla.arrays import Array, Float, Int, Key
from fusevla.model.storage import DTYPE, Stored, restore, take_rows, to_bits
from fusevla.presets import Remat

EPS = 1e-6
T = TypeVar("T")


def lecun_normal(key: Key, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with variance 1/fan_in, float32: the initialiser of every matrix that is not listed otherwise."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def like(parameter: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``parameter`` in x's dtype, broadcast to x's shape along its trailing axes (said aloud: tests refuse it unsaid)."""
    return jnp.broadcast_to(parameter.astype(x.dtype), x.shape)


class Dense(eqx.Module):
    """``x @ kernel + bias`` in the dtype of x (flax's layout: kernel [in, out])."""

    kernel: Float[Array, "*layers inputs outputs"]
    bias: Float[Array, "*layers outputs"]

    def __call__(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        """Maps the last axis."""
        y = x @ self.kernel.astype(x.dtype)
        return y + like(self.bias, y)


class LowRank(eqx.Module):
    """A LoRA adapter (Hu et al. 2021) on the last two axes of a weight: ``scale * (x a) b``."""

    a: Float[Array, "*axes inputs rank"]
    b: Float[Array, "*axes rank outputs"]
    scale: float = eqx.field(static=True)


class Einsum(eqx.Module):
    """A weight applied by an einsum, with an optional low-rank adapter beside it."""

    weight: Float[Array, "*axes inputs outputs"]
    adapter: LowRank | None = None

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``equation`` names x and the weight, e.g. ``"bsd,nde->bsne"``; the adapter's two equations follow from it.

        With L the rank axis, A replaces the weight's last letter by L, B its last but one: for the output projection
        ``"bsne,ned->bsd"`` this sums over heads in A and again in B, as openpi's ``lora.py::Einsum``@15a9616a does.
        """
        y = jnp.einsum(equation, x, self.weight.astype(x.dtype))
        if self.adapter is None:
            return y
        inputs, weight, outputs = equation.replace("->", ",").split(",")
        contracted, produced = weight[-2], weight[-1]
        low = outputs.replace(produced, "L")
        down = jnp.einsum(f"{inputs},{weight.replace(produced, 'L')}->{low}", x, self.adapter.a.astype(x.dtype))
        up = jnp.einsum(f"{low},{weight.replace(contracted, 'L')}->{outputs}", down, self.adapter.b.astype(x.dtype))
        return y + up * self.adapter.scale


class LayerNorm(eqx.Module):
    """LayerNorm in float32, eps 1e-6 (SigLIP's)."""

    scale: Float[Array, "*layers d"]
    bias: Float[Array, "*layers d"]

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        """Normalises the last axis; returns x's dtype."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS)
        return (centred * inverse * like(self.scale, x32) + like(self.bias, x32)).astype(x.dtype)


def rms_normalize(x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
    """``x / sqrt(mean(x^2) + 1e-6)`` in float32 (not cast back)."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPS)


class RMSNorm(eqx.Module):
    """Gemma's RMSNorm: times (1 + scale)."""

    scale: Float[Array, "*layers d"]

    def __call__(self, x: Float[Array, "b s d"], cond: Float[Array, "b r c"] | None = None) -> tuple[Float[Array, "b s d"], None]:
        """Returns (normalised x, no gate); ``cond`` exists so that both norms are called alike, and means nothing here."""
        normed = rms_normalize(x)
        return (normed * (1 + like(self.scale, normed))).astype(x.dtype), None


class ModulatedNorm(eqx.Module):
    """RMSNorm with a scale, a shift and a gate given as values: an ``AdaRMSNorm`` at flow times that are known already."""

    values: Float[Array, "*layers b r c"]
    """Scale, shift and gate side by side, for each of r equal blocks of tokens; b is 1 where all samples share them."""

    def __call__(
        self, x: Float[Array, "b s d"], cond: Float[Array, "b r c"] | None = None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"]]:
        """Returns (modulated x, gate); ``cond`` means nothing here."""
        per_token = jnp.repeat(self.values, x.shape[1] // self.values.shape[1], axis=1)
        shared = jnp.broadcast_to(per_token, (*x.shape[:2], per_token.shape[2]))
        scale, shift, gate = jnp.split(shared, 3, axis=-1)
        normed = rms_normalize(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return normed.astype(x.dtype), gate


class AdaRMSNorm(eqx.Module):
    """RMSNorm whose scale, shift and gate are a linear map of the flow time's embedding (pi0.5; DiT's adaLN)."""

    modulation: Dense

    def at(self, cond: Float[Array, "b r c"]) -> ModulatedNorm:
        """The norm at one time: what ``cond`` (in the compute dtype) makes of it."""
        return ModulatedNorm(self.modulation(cond))

    def __call__(
        self, x: Float[Array, "b s d"], cond: Float[Array, "b r c"] | None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"]]:
        """Returns (modulated x, gate). The s tokens are r equal blocks, one for each condition."""
        if cond is None:
            raise ValueError("AdaRMSNorm needs the embedding of the flow time")
        return self.at(cond.astype(x.dtype))(x)


Norm = RMSNorm | AdaRMSNorm | ModulatedNorm
"""Called alike: ``norm(x, cond) -> (normalised x, gate or None)``."""


def gated_residual(
    x: Float[Array, "b s d"], y: Float[Array, "b s d"], gate: Float[Array, "b s d"] | None
) -> Float[Array, "b s d"]:
    """``x + y * gate``, or ``x + y`` where the norm gave no gate."""
    return x + y if gate is None else x + y * gate


class Embedder(eqx.Module):
    """One table for both ends of the language model (tied)."""

    table: Float[Array, "v d"]

    def embed(self, tokens: Int[Array, "b l"], dtype: Literal["bfloat16", "float32"]) -> Float[Array, "b l d"]:
        """Rows times sqrt(d), the factor rounded to the table's dtype as in the reference (45.25 in bfloat16 at 2048)."""
        rows = take_rows(self.table, tokens)
        factor = jnp.sqrt(jnp.float32(rows.shape[-1])).astype(rows.dtype)
        return (rows * factor).astype(dtype)

    def unembed(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape v"]:
        """Float32 logits ``x @ table.T``, unscaled."""
        return read_out(self.table, x)


def read_out(table: Float[Array, "v d"] | Stored, x: Float[Array, "*shape d"]) -> Float[Array, "*shape v"]:
    """Float32 logits of a table, or of some of its rows, in whatever form it is stored."""
    return jnp.einsum("...d,vd->...v", x, restore(table).astype(x.dtype), preferred_element_type=jnp.float32)  # type: ignore[union-attr]


def checkpointed(function: Callable[..., T], remat: Remat) -> Callable[..., T]:
    """``function(x, *rest)`` with its backward pass trading time for memory: it keeps everything, only matrix products, or x.

    Keeping everything includes what stored weights are read as: a second copy of them, larger than the first. With ``full``,
    every array must be an argument, none closed over.
    """
    if remat == "none":
        return function
    if remat == "full":
        return _recomputed(function)
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)


def _recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """``jax.checkpoint`` that keeps x as bits where it is bfloat16, for the reason that ``storage`` does it to weights."""

    @jax.custom_vjp
    def run(x: Any, rest: tuple[Any, ...]) -> T:
        return function(x, *rest)

    def forward(x: Any, rest: tuple[Any, ...]) -> tuple[T, Any]:
        return run(x, rest), (jax.tree.map(lambda leaf: to_bits(leaf) if leaf.dtype == DTYPE else leaf, x), rest)

    def backward(kept: Any, cotangent: T) -> tuple[Any, tuple[Any, ...]]:
        x, rest = restore(kept[0]), kept[1]
        _, pull_back = jax.vjp(lambda x, rest: function(x, *rest), x, rest)
        return pull_back(cotangent)

    run.defvjp(forward, backward)
    return lambda x, *rest: run(x, rest)
