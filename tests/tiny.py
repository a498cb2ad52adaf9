"""A model and batches small enough to compile in a second."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Batch, Observation
from fusevla.model.fuse import Pi0Fuse, abstract
from fusevla.presets import ExpertConfig, LoraConfig, ModelConfig, VisionConfig
from fusevla.tokens.protocol import protocol_ids

VOCAB = 160
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
CONFIG = ModelConfig(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=8, image_size=16),
    language=ExpertConfig(width=24, depth=2, mlp_dim=32, num_heads=4, head_dim=8, lora=LoraConfig(4, 8.0)),
    action=ExpertConfig(width=16, depth=2, mlp_dim=24, num_heads=4, head_dim=8, lora=LoraConfig(3, 3.0, rslora=True)),
    vocab_size=VOCAB,
    action_dim=5,
    action_horizon=4,
    dtype="float32",
    attention="plain",
    remat="none",
)
WITHOUT_LORA = dataclasses.replace(
    CONFIG,
    language=dataclasses.replace(CONFIG.language, lora=None),
    action=dataclasses.replace(CONFIG.action, lora=None),
)


def tiny_model(config: ModelConfig = CONFIG, seed: int = 0) -> Pi0Fuse:
    """Random everywhere, so that nothing initialised at zero hides a mistake; small enough for rounding not to grow."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.5 * leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.2
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract(config))


def tiny_batch(valid: np.ndarray, ar: np.ndarray, seed: int = 0, cameras: tuple[str, ...] = CAMERAS) -> Batch:
    """Random images, text, actions around the given text masks; targets are the causal tokens."""
    rng = np.random.default_rng(seed)
    size, length = valid.shape
    observation = Observation(
        images={name: rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8) for name in cameras},
        image_masks={name: np.ones(size, bool) for name in cameras},
        state=rng.normal(size=(size, 5)).astype(np.float32),
        tokens=rng.integers(3, protocol_ids(VOCAB).bor, (size, length)).astype(np.int32),
        token_mask=valid,
        token_ar_mask=ar,
    )
    actions = rng.normal(size=(size, 4, 5)).astype(np.float32)
    acts = rng.integers(0, 2, size).astype(bool)
    return jax.tree.map(jnp.asarray, Batch(observation, valid & ar, acts, actions, np.zeros((size, 4), bool)))


def ending_with(model: Pi0Fuse, observation: Observation, word: int) -> tuple[Pi0Fuse, Observation]:
    """The same model and prompts, in which ``word`` is called EOS (and EOS ``word``)."""
    return exchanged(model, observation, word, protocol_ids(model.config.vocab_size).eos)


def exchanged(model: Pi0Fuse, observation: Observation, word: int, other: int) -> tuple[Pi0Fuse, Observation]:
    """The same model and prompts with two words' ids exchanged."""
    rename = np.arange(model.config.vocab_size)
    rename[[word, other]] = rename[[other, word]]
    renamed = eqx.tree_at(lambda m: m.embedder.table, model, model.embedder.table[rename])
    tokens = jnp.asarray(rename[np.asarray(observation.tokens)], jnp.int32)
    return renamed, eqx.tree_at(lambda o: o.tokens, observation, tokens)
