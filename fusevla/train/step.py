"""One optimisation step as a pure function of arrays, and its executables: one for each text bucket, compiled ahead."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fusevla.arrays import Array, Batch, Float, Int, Key
from fusevla.data.augment import augment
from fusevla.losses import Flow, SampleLosses, batch_loss, draw_flow, sample_losses
from fusevla.model.fuse import Pi0Fuse, to_float
from fusevla.presets import AugmentConfig, TrainConfig
from fusevla.train.optim import ema_update, make_optimizer, make_schedule
from fusevla.train.sharding import replicated, split
from fusevla.train.state import TrainState, step_key

T = TypeVar("T")
Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Pi0Fuse, Batch], tuple[TrainState, Metrics]]


class Samples(eqx.Module):
    """A batch, or a part of one, with what was drawn for it: each sample keeps it, in whatever part it is."""

    batch: Batch
    flow: Flow
    position: Int[Array, " b"]
    """In the whole batch: what a sample's augmentation is drawn by."""


def augment_batch(batch: Batch, key: Key, config: AugmentConfig | None, positions: Int[Array, " b"] | None = None) -> Batch:
    """The batch with its images as float32 in [-1, 1], augmented where ``config`` says so; one key for each sample.

    ``positions`` are those of a part's samples in the whole batch.
    """
    images: dict[str, Array] = {name: to_float(image) for name, image in batch.observation.images.items()}
    if config is not None and images:
        images = {**augment(images, key, config, positions)}
    return cast(Batch, eqx.tree_at(lambda b: b.observation.images, batch, images))


def _loss(
    trainable: Pi0Fuse, frozen: Pi0Fuse, batch: Batch, flow: Flow, config: TrainConfig, mask_padded_actions: bool
) -> tuple[Float[Array, ""], SampleLosses]:
    losses = sample_losses(eqx.combine(trainable, frozen), batch, flow, mask_padded_actions=mask_padded_actions)
    return batch_loss(losses, batch.diffusion_loss_mask, config.diffusion_loss_coeff)[0], losses


def train_step(
    state: TrainState, frozen: Pi0Fuse, batch: Batch, *, config: TrainConfig, mask_padded_actions: bool = True
) -> tuple[TrainState, Metrics]:
    """Augment, joint loss, gradients of the trainable leaves only, clip, AdamW. Jit it with ``state`` donated.

    Metrics stay on the device: those of ``joint_loss``, ``grad_norm`` (before the clip) and ``learning_rate``. They, the
    draws and the gradient are those of the whole batch, in however many parts ``config.accumulate`` has it computed.
    """
    augment_key, loss_key = jax.random.split(step_key(state))

    def gradient(samples: Samples) -> tuple[Pi0Fuse, SampleLosses]:
        augmented = augment_batch(samples.batch, augment_key, config.augment, samples.position)
        return jax.grad(_loss, has_aux=True)(state.trainable, frozen, augmented, samples.flow, config, mask_padded_actions)

    samples = Samples(batch, draw_flow(loss_key, batch.actions, config.flow_draws), jnp.arange(batch.actions.shape[0]))
    if config.accumulate == 1:
        grads, losses = gradient(samples)
    else:
        grads, losses = _accumulated(gradient, jax.tree.map(jnp.zeros_like, state.trainable), samples, config.accumulate)
    metrics = batch_loss(losses, batch.diffusion_loss_mask, config.diffusion_loss_coeff)[1]
    updates, opt_state = make_optimizer(config).update(cast(Any, grads), state.opt_state, cast(Any, state.trainable))
    trainable = cast(Pi0Fuse, optax.apply_updates(cast(Any, state.trainable), updates))
    average = None if state.average is None else ema_update(state.average, trainable, cast(float, config.ema_decay))
    metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": make_schedule(config.schedule)(state.step)}
    return TrainState(trainable, opt_state, average, state.key, state.step + 1), metrics


def _accumulated(
    gradient: Callable[[Samples], tuple[Pi0Fuse, SampleLosses]], zero: Pi0Fuse, samples: Samples, parts: int
) -> tuple[Pi0Fuse, SampleLosses]:
    """``gradient`` of all samples by way of equal parts, one at a time: the mean of the parts' gradients, all their losses."""

    def add(total: Pi0Fuse, part: Samples) -> tuple[Pi0Fuse, SampleLosses]:
        grads, losses = gradient(part)
        return jax.tree.map(jnp.add, total, grads), losses

    total, losses = jax.lax.scan(add, zero, divide(samples, parts))
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), losses)
    return jax.tree.map(lambda x: x / parts, total), joined


def divide(tree: T, parts: int) -> T:
    """Every array [b, ...] as [parts, b / parts, ...]. A part holds every ``parts``-th sample.

    Where a batch is split among devices in runs of neighbours, each of them so has its share of every part.
    """
    return cast(T, jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree))


def abstract_batch(batch: Batch, length: int, sharding: jax.sharding.Sharding) -> Batch:
    """Shapes of ``batch`` with its text padded to ``length``."""

    def shape_of(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    same = jax.tree.map(lambda leaf: shape_of(leaf, leaf.shape), batch)
    texts = [shape_of(leaf, (leaf.shape[0], length)) for leaf in _texts(batch)]
    return cast(Batch, eqx.tree_at(_texts, same, texts))


def _texts(batch: Batch) -> list[Any]:
    observation = batch.observation
    return [observation.tokens, observation.token_mask, observation.token_ar_mask, batch.token_loss_mask]


class CompiledSteps:
    """``train_step`` as one executable for each text bucket; nothing is compiled later, an unknown length is an error."""

    def __init__(self, config: TrainConfig, mesh: Mesh, mask_padded_actions: bool = True):
        self._mesh = mesh
        everywhere = replicated(mesh)
        self._jitted = jax.jit(
            partial(train_step, config=config, mask_padded_actions=mask_padded_actions),
            donate_argnums=0,
            out_shardings=(everywhere, everywhere),
        )
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self.seconds: dict[int, float] = {}

    @property
    def executables(self) -> dict[int, jax.stages.Compiled]:
        """Those that are compiled, by text length."""
        return self._compiled

    def compile(
        self,
        state: TrainState,
        frozen: Pi0Fuse,
        batch: Batch,
        lengths: Iterable[int],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[int, float]:
        """Compiles for text of each of ``lengths``; seconds by length. ``batch`` gives all other shapes.

        Leaves may be abstract. Once ``cancelled`` says so, no further compilation begins.
        """
        for length in lengths:
            start = time.perf_counter()
            lowered = self._jitted.lower(state, frozen, abstract_batch(batch, length, split(self._mesh)))
            if cancelled():
                break
            self._compiled[length] = lowered.compile()
            self.seconds[length] = time.perf_counter() - start
        return self.seconds

    def __call__(self, state: TrainState, frozen: Pi0Fuse, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step. ``state`` is donated: use the one returned. Returns before the device is done."""
        length = batch.observation.tokens.shape[1]
        if length not in self._compiled:
            raise ValueError(f"text length: expected one of the compiled buckets {sorted(self._compiled)}, got {length}")
        new_state, metrics = self._compiled[length](state, frozen, batch)
        return cast(TrainState, new_state), cast(Metrics, metrics)


def is_finite(metrics: Metrics) -> bool:
    """Whether loss and gradient norm are numbers (fetches both)."""
    return bool(np.isfinite(np.asarray(metrics["loss"])) and np.isfinite(np.asarray(metrics["grad_norm"])))
