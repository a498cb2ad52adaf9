"""AdamW behind a global-norm clip, with a warm-up and cosine schedule (openpi ``training/optimizer.py``@15a9616a)."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from fusevla.arrays import Array, Float, Int
from fusevla.presets import ScheduleConfig, TrainConfig
from fusevla.train.moments import keep_tower_small

T = TypeVar("T")
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Learning rate of a step (0-based, int32): linear from peak/(warmup+1) to peak, then cosine to ``end``.

    ``decay_steps`` counts from step 0, warm-up included. Raises ``ValueError`` where it is not longer than the warm-up.
    """
    if config.decay_steps <= config.warmup_steps:
        raise ValueError(
            f"schedule: decay_steps counts from step 0 and must exceed warmup_steps={config.warmup_steps}; "
            f"got {config.decay_steps}"
        )
    start = config.peak / (config.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(start, config.peak, config.warmup_steps, config.decay_steps, config.end)

    def learning_rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        # optax mixes int32 counts with Python floats, which strict promotion (on in our tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(schedule(jnp.asarray(step, jnp.int32)), jnp.float32)

    return learning_rate


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip to ``clip_norm``, then AdamW with decoupled weight decay on every leaf, as the published recipe has it.

    The parts, and so the state, are those of ``optax.adamw``, but for the form of the moments (``train.moments``).
    """
    schedule = make_schedule(config.schedule)
    adamw = optax.chain(
        keep_tower_small(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), config.moments),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: schedule(cast(Array, step))),
    )
    chained = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return chained.update(updates, state, params)

    return optax.GradientTransformation(chained.init, update)


def ema_update(average: T, new: T, decay: float) -> T:
    """``decay * average + (1 - decay) * new``, leaf by leaf."""
    return cast(T, jax.tree.map(lambda a, n: decay * a + (1 - decay) * n, average, new))
