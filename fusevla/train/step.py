"""One optimisation step as a pure function of arrays, and its executables: one for each text bucket, compiled ahead."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import equinox as eqx
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fusevla.arrays import Array, Batch, Float, Key
from fusevla.data.augment import augment
from fusevla.losses import joint_loss
from fusevla.model.fuse import Pi0Fuse, to_float
from fusevla.presets import AugmentConfig, TrainConfig
from fusevla.train.optim import ema_update, make_optimizer, make_schedule
from fusevla.train.sharding import replicated, split
from fusevla.train.state import TrainState, step_key

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Pi0Fuse, Batch], tuple[TrainState, Metrics]]


def augment_batch(batch: Batch, key: Key, config: AugmentConfig | None) -> Batch:
    """The batch with its images as float32 in [-1, 1], augmented where ``config`` says so; one key for each sample."""
    images: dict[str, Array] = {name: to_float(image) for name, image in batch.observation.images.items()}
    if config is not None and images:
        images = {**augment(images, key, config)}
    return cast(Batch, eqx.tree_at(lambda b: b.observation.images, batch, images))


def _loss(
    trainable: Pi0Fuse, frozen: Pi0Fuse, batch: Batch, key: Key, config: TrainConfig, mask_padded_actions: bool
) -> tuple[Float[Array, ""], Metrics]:
    model = eqx.combine(trainable, frozen)
    return joint_loss(
        model,
        batch,
        key,
        coeff=config.diffusion_loss_coeff,
        flow_draws=config.flow_draws,
        mask_padded_actions=mask_padded_actions,
    )


def train_step(
    state: TrainState, frozen: Pi0Fuse, batch: Batch, *, config: TrainConfig, mask_padded_actions: bool = True
) -> tuple[TrainState, Metrics]:
    """Augment, joint loss, gradients of the trainable leaves only, clip, AdamW. Jit it with ``state`` donated.

    Metrics stay on the device: those of ``joint_loss``, ``grad_norm`` (before the clip) and ``learning_rate``.
    """
    augment_key, loss_key = jax.random.split(step_key(state))
    batch = augment_batch(batch, augment_key, config.augment)
    gradient = jax.value_and_grad(_loss, has_aux=True)
    (_, metrics), grads = gradient(state.trainable, frozen, batch, loss_key, config, mask_padded_actions)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, cast(Any, state.trainable))
    trainable = cast(Pi0Fuse, optax.apply_updates(cast(Any, state.trainable), updates))
    average = None if state.average is None else ema_update(state.average, trainable, cast(float, config.ema_decay))
    metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": make_schedule(config.schedule)(state.step)}
    return TrainState(trainable, opt_state, average, state.key, state.step + 1), metrics


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
