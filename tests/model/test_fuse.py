"""The model as a whole: who influences whom, what a camera costs, what LoRA changes."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fusevla.model.fuse import abstract, embed_prefix, forward, init, merge_lora, with_lora
from fusevla.model.lora import adapters_of, attach_lora
from fusevla.presets import PI05
from tests.golden_set import relative_error
from tests.strategies import BATCH, TEXT, seeds, text_masks
from tests.tiny import CAMERAS, CONFIG, WITHOUT_LORA, tiny_batch, tiny_model

MODEL = tiny_model()
run = jax.jit(forward)
few = settings(max_examples=10)


def flow(draws: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    noisy = jnp.asarray(rng.normal(size=(BATCH, draws, 4, 5)).astype(np.float32))
    return noisy, jnp.asarray(rng.uniform(0.001, 1, (BATCH, draws)).astype(np.float32))


def half() -> tuple[np.ndarray, np.ndarray]:
    valid = np.array([[True] * 7 + [False] * 2, [True] * TEXT])
    ar = np.zeros_like(valid)
    ar[0, 4:7] = ar[1, 6:] = True
    return valid, ar


def assert_same(a, b, tolerance: float = 2e-5) -> None:
    """Norm-wise, as the numerics contract measures."""
    assert relative_error(a, b) <= tolerance


def test_the_published_sizes():
    base = abstract(
        dataclasses.replace(
            PI05,
            language=dataclasses.replace(PI05.language, lora=None),
            action=dataclasses.replace(PI05.action, lora=None),
        )
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(base) == 3_353_433_872
    assert (count(base.vision), count(base.embedder), count(base.language), count(base.action)) == (
        414_803_696,
        526_647_296,
        1_981_884_416,
        427_932_672,
    )
    assert count(abstract(PI05)) - count(base) == 49_987_584


def test_a_model_is_a_plain_pytree_of_arrays():
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(MODEL))
    assert jax.tree.structure(abstract(CONFIG)) == jax.tree.structure(MODEL)
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(MODEL)
    assert_same(doubled.embedder.table, 2 * MODEL.embedder.table)


@few
@given(text_masks(), seeds())
def test_padding_tokens_change_nothing(masks, seed):
    batch, (noisy, time) = tiny_batch(*masks), flow()
    other = np.random.default_rng(seed).integers(3, 20, masks[0].shape).astype(np.int32)
    tokens = jnp.where(masks[0], batch.observation.tokens, other)
    changed = eqx.tree_at(lambda o: o.tokens, batch.observation, tokens)
    hidden, velocity = run(MODEL, batch.observation, noisy, time)
    hidden_2, velocity_2 = run(MODEL, changed, noisy, time)
    assert_same(velocity, velocity_2)
    assert_same(hidden[:, -TEXT:][masks[0]], hidden_2[:, -TEXT:][masks[0]])


def test_appended_padding_changes_nothing():
    valid, ar = half()
    batch, (noisy, time) = tiny_batch(valid, ar), flow()
    grow = lambda x: jnp.pad(x, ((0, 0), (0, 3)))
    longer = eqx.tree_at(lambda o: (o.tokens, o.token_mask, o.token_ar_mask), batch.observation, replace_fn=grow)
    hidden, velocity = run(MODEL, batch.observation, noisy, time)
    hidden_2, velocity_2 = run(MODEL, longer, noisy, time)
    assert_same(velocity, velocity_2)
    assert_same(hidden[:, -TEXT:][valid], hidden_2[:, -TEXT - 3 : -3][valid])


@few
@given(seeds())
def test_the_prefix_is_independent_of_the_suffix(seed):
    valid, ar = half()
    batch, (noisy, time) = tiny_batch(valid, ar), flow()
    other = np.random.default_rng(seed).integers(3, 20, valid.shape).astype(np.int32)
    changed = eqx.tree_at(lambda o: o.tokens, batch.observation, jnp.where(ar, other, batch.observation.tokens))
    hidden, velocity = run(MODEL, batch.observation, noisy, time)
    hidden_2, velocity_2 = run(MODEL, changed, noisy, time)
    prefix = valid & ~ar
    assert_same(hidden[:, :-TEXT], hidden_2[:, :-TEXT])
    assert_same(hidden[:, -TEXT:][prefix], hidden_2[:, -TEXT:][prefix])
    if (other != np.asarray(batch.observation.tokens))[ar].any():
        assert not np.allclose(velocity, velocity_2, atol=1e-6)  # actions do see the suffix


@few
@given(seeds())
def test_text_is_independent_of_actions(seed):
    valid, ar = half()
    batch = tiny_batch(valid, ar)
    hidden, velocity = run(MODEL, batch.observation, *flow(seed=1))
    hidden_2, velocity_2 = run(MODEL, batch.observation, *flow(seed=seed + 2))
    np.testing.assert_array_equal(hidden[:, -TEXT:][valid], hidden_2[:, -TEXT:][valid])
    np.testing.assert_array_equal(hidden[:, :-TEXT], hidden_2[:, :-TEXT])
    assert not np.allclose(velocity, velocity_2)


def test_a_later_text_token_never_changes_an_earlier_output():
    valid, ar = half()
    batch, (noisy, time) = tiny_batch(valid, ar), flow()
    hidden, _ = run(MODEL, batch.observation, noisy, time)
    tokens = batch.observation.tokens.at[1, -1].add(1)
    hidden_2, _ = run(MODEL, eqx.tree_at(lambda o: o.tokens, batch.observation, tokens), noisy, time)
    assert_same(hidden[1, :-1], hidden_2[1, :-1])
    assert not np.allclose(hidden[1, -1], hidden_2[1, -1])


def test_a_camera_that_is_absent_equals_one_that_is_masked():
    valid, ar = half()
    both, (noisy, time) = tiny_batch(valid, ar).observation, flow()
    masked = eqx.tree_at(lambda o: o.image_masks[CAMERAS[1]], both, jnp.zeros(BATCH, bool))
    absent = dataclasses.replace(
        both, images={CAMERAS[0]: both.images[CAMERAS[0]]}, image_masks={CAMERAS[0]: both.image_masks[CAMERAS[0]]}
    )
    hidden, velocity = run(MODEL, masked, noisy, time)
    hidden_2, velocity_2 = run(MODEL, absent, noisy, time)
    assert_same(velocity, velocity_2)
    assert_same(hidden[:, -TEXT:][valid], hidden_2[:, -TEXT:][valid])
    assert embed_prefix(MODEL, absent).tokens.shape[1] == embed_prefix(MODEL, masked).tokens.shape[1] - 4


def test_a_batch_is_its_samples():
    """Mixed boundaries, one sample without its wrist camera."""
    observation, (noisy, time) = tiny_batch(*half()).observation, flow()
    observation = eqx.tree_at(lambda o: o.image_masks[CAMERAS[1]], observation, jnp.array([False, True]))
    hidden, velocity = run(MODEL, observation, noisy, time)
    for row in range(BATCH):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], (observation, noisy, time))
        alone, velocity_alone = run(MODEL, *one)
        assert_same(velocity[row], velocity_alone[0])
        valid = np.asarray(embed_prefix(MODEL, one[0]).valid[0])
        assert_same(hidden[row][valid], alone[0][valid])


def test_several_draws_are_what_each_gives_alone():
    batch, (noisy, time) = tiny_batch(*half()), flow(draws=3)
    together = run(MODEL, batch.observation, noisy, time)[1]
    for draw in range(3):
        alone = run(MODEL, batch.observation, noisy[:, draw : draw + 1], time[:, draw : draw + 1])[1]
        assert_same(together[:, draw], alone[:, 0])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_number(remat):
    batch, (noisy, time) = tiny_batch(*half()), flow()

    def loss(model):
        return jnp.mean(jnp.square(forward(model, batch.observation, noisy, time)[1]))

    other = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, remat=remat))
    plain, saved = jax.jit(jax.grad(loss))(MODEL), jax.jit(jax.grad(loss))(other)
    assert all(relative_error(a, b) < 2e-5 or not np.any(b) for a, b in zip(*map(jax.tree.leaves, (saved, plain)), strict=True))


def test_fresh_adapters_change_nothing_bit_for_bit():
    base = tiny_model(WITHOUT_LORA)
    adapted = with_lora(base, CONFIG, jax.random.key(5))
    batch, (noisy, time) = tiny_batch(*half()), flow()
    for a, b in zip(run(base, batch.observation, noisy, time), run(adapted, batch.observation, noisy, time), strict=True):
        np.testing.assert_array_equal(a, b)
    adapters = [a for expert in (adapted.language, adapted.action) for a in adapters_of(expert)]
    assert all(a is not None and not a.b.any() and a.a.any() for a in adapters)
    assert [a.scale for a in adapters] == [2.0] * 5 + [3 / 3**0.5] * 5
    assert jax.tree.leaves(attach_lora(adapted.language, None, jax.random.key(0))) == jax.tree.leaves(base.language)


def test_merged_adapters_are_the_same_function():
    batch, (noisy, time) = tiny_batch(*half()), flow()
    merged = jax.jit(merge_lora)(MODEL)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract(WITHOUT_LORA))
    for a, b in zip(run(MODEL, batch.observation, noisy, time), run(merged, batch.observation, noisy, time), strict=True):
        assert_same(a, b)


def test_bfloat16_stays_close_to_float32():
    batch, (noisy, time) = tiny_batch(*half()), flow()
    half_precision = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    exact, rounded = run(MODEL, batch.observation, noisy, time)[1], run(half_precision, batch.observation, noisy, time)[1]
    assert rounded.dtype == jnp.float32
    assert np.linalg.norm(exact - rounded) < 0.05 * np.linalg.norm(exact)


def test_a_model_from_scratch_speaks_at_chance_and_is_finite():
    model = jax.jit(lambda key: init(WITHOUT_LORA, key))(jax.random.key(0))
    batch, (noisy, time) = tiny_batch(*half()), flow()
    hidden, velocity = run(model, batch.observation, noisy, time)
    logits = model.embedder.unembed(hidden)
    assert np.isfinite(velocity).all()
    assert 0.3 < float(jnp.std(logits)) < 3.0
