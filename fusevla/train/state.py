"""The arrays that change during training, as one pytree that can be donated, saved and restored as it is."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import UInt32

from fusevla.arrays import Array, Int, Key
from fusevla.model.fuse import Pi0Fuse

KEY_IMPLEMENTATION = "threefry2x32"


class TrainState(eqx.Module):
    """Trainable leaves (None where the model is frozen), optimizer state, optional average, and the step.

    The frozen leaves are deliberately elsewhere: this tree is donated to every step, they are not. ``key`` is the raw
    uint32 data of the run's one base key; step n draws from ``fold_in(key, n)``, so that a resumed run draws the same.
    """

    trainable: Pi0Fuse
    opt_state: Any
    average: Pi0Fuse | None
    key: UInt32[Array, "2"]
    step: Int[Array, ""]


def init_state(trainable: Pi0Fuse, optimizer: optax.GradientTransformation, key: Key, ema: bool = False) -> TrainState:
    """The state before step 0. Arrays of ``trainable`` are used, not copied: hand them over."""
    average = cast(Pi0Fuse, jax.tree.map(jnp.copy, trainable)) if ema else None
    opt_state = optimizer.init(cast(Any, trainable))
    return TrainState(trainable, opt_state, average, jax.random.key_data(key), jnp.zeros((), jnp.int32))


def step_key(state: TrainState) -> Key:
    """The key of the state's current step."""
    return jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(state.key), impl=KEY_IMPLEMENTATION), state.step)


def evaluation_leaves(state: TrainState) -> Pi0Fuse:
    """What to evaluate and deploy: the average where there is one, else the trainable leaves."""
    return state.trainable if state.average is None else state.average
