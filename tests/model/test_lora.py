"""Merging adapters: every matrix by itself, every combination of options, and what rounding is allowed."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.model.fuse import abstract, merge_lora
from fusevla.model.layers import Einsum
from fusevla.policy.sampling import act, prefill, reason
from fusevla.presets import LoraConfig, without_lora
from tests.golden_set import F32, relative_error
from tests.strategies import seeds
from tests.tiny import CONFIG, tiny_batch, tiny_model

EQUATIONS = {
    "q": "bsd,nde->bsne",
    "kv": "bsd,cmde->cbsme",
    "out": "bsne,ned->bsd",
    "gating": "bsd,cdf->cbsf",
    "linear": "bsf,fd->bsd",
}


def config_with(lora: LoraConfig | None, action_lora: LoraConfig | None, kv_heads: int = 1):
    """The tiny sizes with these adapters; ``kv_heads`` 1 and 2 share keys between heads, 4 is one for each."""
    language = dataclasses.replace(CONFIG.language, lora=lora, num_kv_heads=kv_heads)
    action = dataclasses.replace(CONFIG.action, lora=action_lora, num_kv_heads=kv_heads)
    return dataclasses.replace(CONFIG, language=language, action=action)


def loras() -> st.SearchStrategy[LoraConfig | None]:
    make = partial(st.builds, LoraConfig, rank=st.integers(1, 5), alpha=st.sampled_from([0.5, 4.0, 16.0]))
    return st.none() | make(
        rslora=st.booleans(), attention=st.booleans(), feed_forward=st.booleans(), scale_feed_forward=st.booleans()
    )


@pytest.mark.slow
@settings(max_examples=15)
@given(loras(), loras(), st.sampled_from([1, 2, 4]), seeds())
def test_each_merged_matrix_is_the_same_map(lora, action_lora, kv_heads, seed):
    model = tiny_model(config_with(lora, action_lora, kv_heads), seed)
    merged = merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract(without_lora(model.config)))
    rng = np.random.default_rng(seed)
    for before, after in ((model.language, merged.language), (model.action, merged.action)):
        for name, equation in EQUATIONS.items():
            old: Einsum = jax.tree.map(lambda leaf: leaf[1], getattr(before.layers, name))
            new: Einsum = jax.tree.map(lambda leaf: leaf[1], getattr(after.layers, name))
            shape = (2, 3, old.weight.shape[0], old.weight.shape[1]) if name == "out" else (2, 3, old.weight.shape[-2])
            x = jnp.asarray(rng.normal(size=shape).astype(np.float32))
            assert relative_error(new(equation, x), old(equation, x)) <= F32
    for name in ("vision", "embedder", "action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj"):
        assert eqx.tree_equal(getattr(merged, name), getattr(model, name))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_merged_policy_says_and_does_the_same(kv_heads):
    model = tiny_model(config_with(LoraConfig(4, 8.0), LoraConfig(3, 3.0, rslora=True), kv_heads))
    valid = np.arange(9)[None] < np.array([9, 5])[:, None]
    noise = jax.random.normal(jax.random.key(1), (2, 1, 4, 5))

    @jax.jit
    def answer(model, observation):
        state = prefill(model, observation, 7)
        return state.logits, reason(model, state, 6)[0].tokens, act(model, state, noise, 3)

    observation = tiny_batch(valid, np.zeros_like(valid)).observation
    logits, tokens, actions = answer(model, observation)
    merged_logits, merged_tokens, merged_actions = answer(jax.jit(merge_lora)(model), observation)
    assert relative_error(merged_logits, logits) <= 2 * F32
    assert relative_error(merged_actions, actions) <= 2 * F32
    np.testing.assert_array_equal(merged_tokens, tokens)


def test_bfloat16_weights_stay_bfloat16_and_are_rounded_once():
    model = tiny_model(config_with(LoraConfig(4, 8.0), None))
    frozen = eqx.tree_at(lambda m: m.language.layers.out.weight, model, model.language.layers.out.weight.astype(jnp.bfloat16))
    exact = eqx.tree_at(lambda m: m.language.layers.out.weight, model, frozen.language.layers.out.weight.astype(jnp.float32))
    ours, wanted = (merge_lora(m).language.layers.out.weight for m in (frozen, exact))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.astype(jnp.float32), wanted.astype(jnp.bfloat16).astype(jnp.float32))
