"""The choice of attention: the right candidates for a device, and none that was not checked."""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.model import attention_choice
from fusevla.model.attention import attention, evened
from fusevla.model.attention_choice import candidates, choose, disagreement, on_this_device, with_attention
from fusevla.model.fuse import forward, init
from fusevla.presets import FULL, LIBERO10, PRESETS, TOY, ModelConfig
from tests import references
from tests.tiny import CONFIG, tiny_batch

H200 = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
HEADS = dataclasses.replace(CONFIG, attention="auto")
BF16 = dataclasses.replace(HEADS, dtype="bfloat16")


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, ("plain",)),
        ("gpu", "8.0", ("xla", "plain")),
        ("gpu", "8.9", ("xla", "plain")),
        ("gpu", "9.0", ("cudnn", "xla", "plain")),
        ("gpu", "10.3", ("cudnn", "xla", "plain")),
        ("gpu", "7.5", ("xla", "plain")),
        ("gpu", "gfx90a", ("xla", "plain")),
        ("tpu", None, ("xla", "plain")),
    ],
)
def test_candidates_follow_the_device(platform: str, capability: str | None, expected: tuple[str, ...]) -> None:
    assert candidates(platform, capability) == expected


@pytest.mark.parametrize("config", [HEADS, BF16], ids=["float32", "bfloat16"])
def test_xla_agrees_with_plain(config: ModelConfig) -> None:
    assert disagreement(config, "xla") is None


def chosen(config: ModelConfig, device: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    return choose(config, device, said.append), said


def test_cudnn_cannot_run_here_and_the_next_is_taken() -> None:
    name, said = chosen(BF16, H200)
    assert name == "xla"
    assert len(said) == 1
    assert said[0].startswith("attention: not cudnn on NVIDIA H200: ")
    assert chosen(BF16, A100) == ("xla", [])
    assert chosen(BF16, CPU) == ("plain", [])


def wrong_mask(q, k, v, mask, name):
    return attention(q, k, v, jnp.ones_like(mask) if name != "plain" else mask, "plain")


def wrong_scale(q, k, v, mask, name):
    return attention(q if name == "plain" else q * q.shape[-1] ** -0.5, k, v, mask, "plain")


def no_gradient_of_values(q, k, v, mask, name):
    return attention(q, k, v if name == "plain" else jax.lax.stop_gradient(v), mask, "plain")


def not_a_number(q, k, v, mask, name):
    return attention(q, k, v, mask, "plain") * (1.0 if name == "plain" else jnp.nan)


def refuses(q, k, v, mask, name):
    if name != "plain":
        raise NotImplementedError("The head dim must be <= 128")
    return attention(q, k, v, mask, "plain")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong_mask, "its output differs"),
        (wrong_scale, "its output differs"),
        (no_gradient_of_values, "its gradient of v differs"),
        (not_a_number, "differs from plain's by nan"),
        (refuses, "NotImplementedError: The head dim must be <= 128"),
    ],
)
def test_what_is_wrong_or_raises_is_refused(kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "attention", kernel)
    name, said = chosen(HEADS, H200)
    assert name == "plain"
    assert [line.split(" on ")[0] for line in said] == ["attention: not cudnn", "attention: not xla"]
    assert all(reason in line for line in said)


def test_the_first_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "attention", lambda q, k, v, mask, name: attention(q, k, v, mask, "plain"))
    assert chosen(HEADS, H200) == ("cudnn", [])


def test_presets_of_the_full_size_choose_and_all_others_say() -> None:
    assert {name for name, preset in PRESETS.items() if preset.model.attention == "auto"} == {
        name for name, preset in PRESETS.items() if name.startswith("libero1")
    }
    assert on_this_device(LIBERO10).model == with_attention(FULL, CPU)
    assert with_attention(FULL, CPU).attention == "plain"
    assert on_this_device(TOY) == TOY


def test_a_model_that_was_not_resolved_does_not_run() -> None:
    model = jax.eval_shape(partial(init, HEADS), jax.random.key(0))
    flags = np.ones((1, 3), bool)
    observation = tiny_batch(flags, flags).observation
    with pytest.raises(ValueError, match="expected plain, xla or cudnn by the time a model runs, got auto"):
        jax.eval_shape(forward, model, observation, jnp.zeros((1, 1, 4, 5)), jnp.zeros((1, 1)))


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (6, 7), (5, 8), (6, 8)])
def test_lengths_are_made_even_without_changing_a_number(queries: int, keys: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32) for length, n in ((queries, 4), (keys, 2), (keys, 2)))
    mask = rng.random((2, queries, keys)) < 0.6
    mask[:, :, 0] = True
    seen: list[tuple[int, int]] = []

    def run(q, k, v, mask):
        seen.append(mask.shape[1:])
        assert (q.shape[1], k.shape[1], v.shape[1]) == (*mask.shape[1:], mask.shape[2])
        return attention(q, k, v, mask, "plain")

    def made_even(q, k, v):
        return evened(run, q, k, v, jnp.asarray(mask))

    def plainly(q, k, v):
        return attention(q, k, v, jnp.asarray(mask), "plain")

    def gradients(function):
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs))), argnums=(0, 1, 2))(q, k, v)

    expected = references.attention(np.asarray(q), np.asarray(k), np.asarray(v), mask)
    np.testing.assert_allclose(made_even(q, k, v), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(made_even), gradients(plainly), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(q % 2 == k % 2 == 0 for q, k in seen)
