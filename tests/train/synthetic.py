"""A model of a few thousand parameters and random batches for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusevla.arrays import Batch, Observation
from fusevla.model import fuse
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import ExpertConfig, LoraConfig, ModelConfig, ScheduleConfig, TrainConfig, VisionConfig
from fusevla.train.freeze import partition
from fusevla.train.optim import make_optimizer
from fusevla.train.sharding import make_mesh, put_batch, replicate
from fusevla.train.state import TrainState, init_state
from fusevla.train.step import CompiledSteps

LORA = LoraConfig(rank=2, alpha=4.0)
MODEL = ModelConfig(
    vision=VisionConfig(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=14, image_size=28),
    language=ExpertConfig(width=16, depth=2, mlp_dim=32, num_heads=2, head_dim=8, lora=LORA),
    action=ExpertConfig(width=8, depth=2, mlp_dim=16, num_heads=2, head_dim=8, lora=LORA),
    vocab_size=160,
    action_dim=4,
    action_horizon=3,
    dtype="float32",
    attention="plain",
    remat="none",
)
TRAIN = TrainConfig(
    steps=6, batch_size=4, schedule=ScheduleConfig(peak=1e-2, end=1e-3, warmup_steps=1, decay_steps=6), log_every=1, save_every=2
)
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")


MESH = make_mesh(jax.devices()[:1])


def fresh(config: TrainConfig, mesh: Mesh = MESH) -> tuple[TrainState, Pi0Fuse]:
    """(state, frozen) before step 0."""
    trainable, frozen = partition(jax.tree.map(jnp.copy, small_model()), config.freeze)
    state = init_state(trainable, make_optimizer(config), jax.random.key(config.seed), ema=config.ema_decay is not None)
    return replicate(state, mesh), replicate(frozen, mesh)


@functools.cache
def compiled(config: TrainConfig) -> CompiledSteps:
    """The step for batches of ``random_batch``: compiling takes most of these tests' time, so it is shared."""
    steps = CompiledSteps(config, MESH)
    steps.compile(*fresh(config), random_batch(0), [12])
    return steps


def run(config: TrainConfig, batches: list[Batch]) -> tuple[TrainState, Pi0Fuse, list[dict[str, np.ndarray]]]:
    """(state, frozen, metrics of each step) after a step on each batch."""
    state, frozen = fresh(config)
    metrics = []
    for batch in batches:
        state, values = compiled(config)(state, frozen, put_batch(batch, MESH))
        metrics.append(jax.device_get(values))
    return state, frozen, metrics


@functools.cache
def small_model(seed: int = 0, lora: bool = True) -> Pi0Fuse:
    """Random everywhere, zero-initialised leaves too, so that every leaf gets a gradient."""
    config = MODEL if lora else without_lora(MODEL)
    leaves, structure = jax.tree.flatten(fuse.abstract(config))
    generator = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(0.3 * generator.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def without_lora(config: ModelConfig) -> ModelConfig:
    language, action = (dataclasses.replace(expert, lora=None) for expert in (config.language, config.action))
    return dataclasses.replace(config, language=language, action=action)


def random_batch(seed: int, size: int = 4, length: int = 12) -> Batch:
    """Half of the samples reason, half act; NumPy."""
    generator = np.random.default_rng(seed)
    size28 = (size, MODEL.vision.image_size, MODEL.vision.image_size, 3)
    prefix, used = length // 2, length - 2
    index = np.arange(length)[None].repeat(size, 0)
    acts = np.arange(size) % 2 == 1
    observation = Observation(
        images={name: generator.integers(0, 256, size28).astype(np.uint8) for name in CAMERAS},
        image_masks={name: np.ones(size, bool) for name in CAMERAS},
        state=generator.normal(size=(size, MODEL.action_dim)).astype(np.float32),
        tokens=generator.integers(3, 20, (size, length)).astype(np.int32),
        token_mask=index < used,
        token_ar_mask=(index >= prefix) & (index < used),
    )
    return Batch(
        observation=observation,
        token_loss_mask=(index >= prefix) & (index < used) & ~acts[:, None],
        diffusion_loss_mask=acts,
        actions=generator.normal(size=(size, MODEL.action_horizon, MODEL.action_dim)).astype(np.float32),
        action_is_pad=np.zeros((size, MODEL.action_horizon), bool),
    )
