"""The schedule and AdamW against the numbers of the reference, and what the configuration refuses."""

from pathlib import Path
from typing import Any, cast

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusevla.presets import ScheduleConfig, TrainConfig, scratch_schedule
from fusevla.train.optim import ema_update, make_optimizer, make_schedule


@pytest.fixture(scope="module")
def small(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "small.npz"))


def cases(arrays: dict[str, np.ndarray], name: str) -> list[str]:
    return sorted({key.split("/")[1] for key in arrays if key.startswith(f"{name}/") and key.count("/") > 1})


def test_learning_rates(small: dict[str, np.ndarray]) -> None:
    assert cases(small, "lr")
    for case in cases(small, "lr"):
        warmup, peak, decay, end = small[f"lr/{case}/cfg"]
        schedule = make_schedule(ScheduleConfig(peak=peak, end=end, warmup_steps=int(warmup), decay_steps=int(decay)))
        got = [jax.jit(schedule)(jnp.asarray(step, jnp.int32)) for step in small[f"lr/{case}/steps"]]
        np.testing.assert_allclose(got, small[f"lr/{case}/lr"], rtol=1e-5)


def group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, jax.Array]:
    return {key.removeprefix(prefix): jnp.asarray(value) for key, value in arrays.items() if key.startswith(prefix)}


def relative(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def test_adamw_steps(small: dict[str, np.ndarray]) -> None:
    optimizer = make_optimizer(TrainConfig(schedule=ScheduleConfig(peak=1e-2, end=1e-3, warmup_steps=2, decay_steps=10)))
    assert cases(small, "adamw")
    for case in cases(small, "adamw"):
        params = group(small, f"adamw/{case}/p0/")
        state = optimizer.init(params)
        for step in range(3):
            grads = group(small, f"adamw/{case}/g{step}/")
            np.testing.assert_allclose(optax.tree.norm(grads), small[f"adamw/{case}/gnorm{step}"], rtol=1e-5)
            updates: dict[str, Any]
            updates, state = jax.jit(optimizer.update)(grads, state, params)
            params = cast(dict[str, jax.Array], optax.apply_updates(params, updates))
            for name in params:
                assert relative(updates[name], jnp.asarray(small[f"adamw/{case}/u{step}/{name}"])) < 1e-5
                assert relative(params[name], jnp.asarray(small[f"adamw/{case}/p{step + 1}/{name}"])) < 1e-5
        for moment in ("mu", "nu"):
            for name, value in optax.tree.get(state, moment).items():
                assert relative(value, jnp.asarray(small[f"adamw/{case}/{moment}/{name}"])) < 1e-5


@hypothesis.given(st.integers(1, 50), st.integers(51, 400), st.integers(0, 500))
@hypothesis.settings(max_examples=25, deadline=None)
def test_schedule_stays_between_its_ends(warmup: int, decay: int, step: int) -> None:
    config = ScheduleConfig(peak=1e-3, end=1e-4, warmup_steps=warmup, decay_steps=decay)
    schedule = make_schedule(config)
    assert schedule(0) == pytest.approx(1e-3 / (warmup + 1), rel=1e-5)
    assert schedule(warmup) == pytest.approx(1e-3)
    assert schedule(decay + step) == pytest.approx(1e-4, rel=1e-4)
    assert 0 < schedule(step) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(3, 0), (200, 20), (1000, 100), (30_000, 100)])
def test_schedule_from_scratch(steps: int, warmup: int) -> None:
    config = scratch_schedule(steps)
    assert (config.peak, config.warmup_steps, config.decay_steps) == (1e-3, warmup, steps)
    assert make_schedule(config)(warmup) == pytest.approx(1e-3)


def test_decay_shorter_than_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="must exceed warmup_steps=300; got 200"):
        make_schedule(ScheduleConfig(warmup_steps=300, decay_steps=200))


def test_average() -> None:
    assert ema_update({"a": jnp.float32(1.0)}, {"a": jnp.float32(3.0)}, 0.75)["a"] == 1.5
