"""Pi0Fuse: pi0.5 that writes its plan (text, language expert) or moves (actions, flow matching, action expert)."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from fusevla.arrays import Array, Bool, Float, Key, Observation
from fusevla.model.attention import Implementation
from fusevla.model.gemma import Expert, Stream, init_expert, transformer
from fusevla.model.layers import Dense, Embedder, lecun_normal
from fusevla.model.lora import attach_lora, merge_adapters
from fusevla.model.masks import with_action_blocks
from fusevla.model.siglip import SigLIP, init_dense, init_siglip
from fusevla.presets import ModelConfig, without_lora

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


class Pi0Fuse(eqx.Module):
    """All weights of the policy: a pytree of arrays, and its sizes as a static field."""

    vision: SigLIP
    embedder: Embedder
    language: Expert
    action: Expert
    action_in_proj: Dense
    time_mlp_in: Dense
    time_mlp_out: Dense
    action_out_proj: Dense
    config: ModelConfig = eqx.field(static=True)


class Prefix(eqx.Module):
    """Images and text as tokens (p of them), with what the masks need."""

    tokens: Float[Array, "b p d"]
    valid: Bool[Array, "b p"]
    ar: Bool[Array, "b p"]


def init(config: ModelConfig, key: Key) -> Pi0Fuse:
    """A model from scratch, float32, with fresh adapters where ``config`` has LoRA. For sizes that fit: see ``abstract``."""
    d, width = config.action_dim, config.action.width
    keys = jax.random.split(key, 10)
    table = lecun_normal(keys[0], (config.vocab_size, config.language.width), config.language.width)
    model = Pi0Fuse(
        vision=init_siglip(config.vision, config.language.width, keys[1]),
        embedder=Embedder(table),
        language=init_expert(config.language, None, keys[2]),
        action=init_expert(config.action, width, keys[3]),
        action_in_proj=init_dense(keys[4], d, width),
        time_mlp_in=init_dense(keys[5], width, width),
        time_mlp_out=init_dense(keys[6], width, width),
        action_out_proj=init_dense(keys[7], width, d),
        config=config,
    )
    return with_lora(model, config, keys[8])


def with_lora(model: Pi0Fuse, config: ModelConfig, key: Key) -> Pi0Fuse:
    """The same base with fresh adapters as ``config`` says (and none where it says None)."""
    language_key, action_key = jax.random.split(key)
    return dataclasses.replace(
        model,
        language=attach_lora(model.language, config.language.lora, language_key),
        action=attach_lora(model.action, config.action.lora, action_key),
        config=config,
    )


def merge_lora(model: Pi0Fuse) -> Pi0Fuse:
    """The model for inference: adapters added to their weights and gone, so that every call has fewer matrix products.

    The same function up to rounding; weights keep their dtype. Training cannot go on from it.
    """
    return dataclasses.replace(
        model,
        language=merge_adapters(model.language),
        action=merge_adapters(model.action),
        config=without_lora(model.config),
    )


def abstract(config: ModelConfig) -> Pi0Fuse:
    """The model's shapes without its numbers: ``jax.ShapeDtypeStruct`` leaves, float32. Costs no memory at any size."""
    return jax.eval_shape(lambda key: init(config, key), ShapeDtypeStruct((), jax.random.key(0).dtype))


def to_float(image: Array) -> Float[Array, "b height width 3"]:
    """uint8 [0, 255] to float32 [-1, 1]; float images pass."""
    return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else jnp.asarray(image)


def embed_images(model: Pi0Fuse, images: dict[str, Array]) -> dict[str, Float[Array, "b s d"]]:
    """Tokens of every camera that is there. All cameras go through the tower as one batch."""
    config = model.config
    names = sorted(images)
    joined = jnp.concatenate([to_float(images[name]) for name in names])
    softmax_dtype = "float32" if config.vision.float32_softmax else config.dtype
    tokens = model.vision(joined, config.dtype, _vision_attention(config), config.remat, softmax_dtype)
    return dict(zip(names, jnp.split(tokens, len(names)), strict=True))


def _vision_attention(config: ModelConfig) -> Implementation:
    """The tower stays on XLA where Gemma uses cuDNN: its unmasked, short, head_dim-72 attention gains nothing measured."""
    return "xla" if config.attention == "cudnn" else config.attention


def embed_prefix(model: Pi0Fuse, observation: Observation) -> Prefix:
    """Cameras in the order of their names, then text. A camera that is not in ``images`` costs nothing."""
    images = embed_images(model, observation.images) if observation.images else {}
    text = model.embedder.embed(observation.tokens, model.config.dtype)
    seen = [jnp.repeat(observation.image_masks[name][:, None], x.shape[1], axis=1) for name, x in images.items()]
    return Prefix(
        tokens=jnp.concatenate([*images.values(), text], axis=1),
        valid=jnp.concatenate([*seen, observation.token_mask], axis=1),
        ar=jnp.concatenate([*(jnp.zeros(mask.shape, bool) for mask in seen), observation.token_ar_mask], axis=1),
    )


def time_embedding(time: Float[Array, "*shape"], width: int) -> Float[Array, "*shape {width}"]:
    """``concat(sin, cos)`` of 2 pi t / period over width/2 periods from 4e-3 to 4, geometric; float32."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = jnp.multiply.outer(time, 1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def embed_time(model: Pi0Fuse, time: Float[Array, "b r"]) -> Float[Array, "b r d"]:
    """The condition of the action expert's norms: sinusoids through two dense layers with swish, float32."""
    hidden = jax.nn.swish(model.time_mlp_in(time_embedding(time, model.config.action.width)))
    return jax.nn.swish(model.time_mlp_out(hidden))


def embed_actions(model: Pi0Fuse, noisy: Float[Array, "b r h a"], time: Float[Array, "b r"]) -> Stream:
    """The action expert's tokens (r blocks of h, in the compute dtype) and their condition."""
    tokens = model.action_in_proj(noisy)
    flat = tokens.reshape(noisy.shape[0], -1, tokens.shape[-1])
    return Stream(flat.astype(model.config.dtype), embed_time(model, time))


def velocity(model: Pi0Fuse, hidden: Float[Array, "b s d"], draws: int) -> Float[Array, "b {draws} _ _"]:
    """Float32 velocities [b, draws, h, a] from the action expert's outputs."""
    v = model.action_out_proj(hidden.astype(jnp.float32))
    return v.reshape(v.shape[0], draws, -1, v.shape[-1])


def forward(
    model: Pi0Fuse,
    observation: Observation,
    noisy: Float[Array, "b r h a"],
    time: Float[Array, "b r"],
    *,
    text_only: bool = False,
) -> tuple[Float[Array, "b p d"], Float[Array, "b r h a"]]:
    """One joint pass: the language expert's outputs for images and text, and a velocity for each of the r flow draws.

    With ``text_only`` the outputs are those for the text (p = l), and the last layer makes no others.
    """
    prefix = embed_prefix(model, observation)
    draws, horizon = noisy.shape[1:3]
    mask, positions = with_action_blocks(prefix.valid, prefix.ar, draws, horizon)
    (hidden, actions), _ = transformer(
        (model.language, model.action),
        (Stream(prefix.tokens), embed_actions(model, noisy, time)),
        mask,
        positions,
        implementation=model.config.attention,
        remat=model.config.remat,
        read=observation.tokens.shape[1] if text_only else None,
    )
    return hidden, velocity(model, actions, draws)
