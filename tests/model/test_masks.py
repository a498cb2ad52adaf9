"""Every mask: against literal pictures, against a loop, and by the properties that the token protocol promises."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from fusevla.model.masks import attention_mask, blocks_after_cache, positions, prefix_of, with_action_blocks
from tests import references
from tests.strategies import any_masks, text_masks

mask_of = jax.jit(attention_mask)
joint = jax.jit(with_action_blocks, static_argnums=(2, 3))


def picture(rows: str) -> np.ndarray:
    return np.array([[mark == "x" for mark in row.split()] for row in rows.strip().splitlines()])


def test_a_reasoning_sample_looks_like_this():
    """Three prefix tokens, two of the suffix, one of padding."""
    valid = jnp.array([[True] * 5 + [False]])
    ar = jnp.array([[False] * 3 + [True] * 2 + [False]])
    expected = picture("""
        x x x . . .
        x x x . . .
        x x x . . .
        x x x x . .
        x x x x x .
        . . . . . .
    """)
    np.testing.assert_array_equal(mask_of(valid, ar)[0], expected)


def test_action_blocks_look_like_this():
    """A prefix token, a suffix token and padding, then two draws of two steps."""
    valid, ar = jnp.array([[True, True, False]]), jnp.array([[False, True, False]])
    mask, where = joint(valid, ar, 2, 2)
    expected = picture("""
        x . . . . . .
        x x . . . . .
        . . . . . . .
        x x . x x . .
        x x . x x . .
        x x . . . x x
        x x . . . x x
    """)
    np.testing.assert_array_equal(mask[0], expected)
    np.testing.assert_array_equal(where[0], [0, 1, 1, 2, 3, 2, 3])


@given(any_masks())
def test_it_is_what_the_loop_says(masks):
    np.testing.assert_array_equal(mask_of(*masks), references.attention_mask(*masks))


@given(text_masks())
def test_padding_is_neither_seen_nor_sees(masks):
    valid, ar = masks
    mask = np.asarray(mask_of(valid, ar))
    assert not mask[~valid].any()
    assert not mask.transpose(0, 2, 1)[~valid].any()


@given(text_masks())
def test_the_prefix_never_sees_the_suffix_and_text_never_sees_actions(masks):
    valid, ar = masks
    mask = np.asarray(joint(valid, ar, 2, 3)[0])
    length = valid.shape[1]
    assert not mask[:, :length, length:].any()
    for row in range(len(valid)):
        prefix, suffix = valid[row] & ~ar[row], valid[row] & ar[row]
        assert not mask[row, :length][prefix][:, :length][:, suffix].any()
        assert mask[row, :length][suffix][:, :length][:, prefix].all()


@given(text_masks(batch=3))
def test_every_sample_has_its_own_boundary(masks):
    valid, ar = masks
    together = np.asarray(joint(valid, ar, 1, 2)[0])
    for row in range(3):
        np.testing.assert_array_equal(together[row], joint(valid[row : row + 1], ar[row : row + 1], 1, 2)[0][0])


@given(text_masks())
def test_one_draw_is_the_published_sequence(masks):
    """One action block equals a block with ar 1, 0, 0, ... behind the text (on rows that mean something)."""
    valid, ar = masks
    mask, where = joint(valid, ar, 1, 3)
    more = np.ones((len(valid), 3), bool)
    starts = np.broadcast_to([True, False, False], more.shape)
    full_valid, full_ar = np.concatenate([valid, more], axis=1), np.concatenate([ar, starts], axis=1)
    np.testing.assert_array_equal(mask, references.attention_mask(full_valid, full_ar))
    np.testing.assert_array_equal(where, np.cumsum(full_valid, axis=1) - 1)


@given(text_masks())
def test_draws_are_blind_to_each_other_and_stand_at_the_same_positions(masks):
    valid, ar = masks
    one, where_one = joint(valid, ar, 1, 2)
    two, where_two = joint(valid, ar, 2, 2)
    length = valid.shape[1]
    first, second = np.r_[:length, length : length + 2], np.r_[:length, length + 2 : length + 4]
    for keep in (first, second):
        np.testing.assert_array_equal(np.asarray(two)[:, keep][:, :, keep], one)
        np.testing.assert_array_equal(np.asarray(where_two)[:, keep], where_one)
    assert not np.asarray(two)[:, length : length + 2, length + 2 :].any()


@given(text_masks())
def test_positions_count_valid_tokens_only(masks):
    valid, _ = masks
    where = np.asarray(positions(jnp.asarray(valid)))
    for row in range(len(valid)):
        np.testing.assert_array_equal(where[row][valid[row]], np.arange(valid[row].sum()))


@given(text_masks())
def test_the_prefix_ends_before_the_first_causal_token(masks):
    valid, ar = masks
    np.testing.assert_array_equal(prefix_of(jnp.asarray(valid), jnp.asarray(ar)), valid & ~ar)


@given(text_masks())
def test_blocks_after_a_cache_see_what_blocks_after_the_text_see(masks):
    valid, ar = masks
    length = valid.shape[1]
    cached = np.pad(valid, ((0, 0), (0, 4)))
    mask = blocks_after_cache(jnp.asarray(cached), length, 2, 2)
    np.testing.assert_array_equal(mask, joint(valid, ar, 2, 2)[0][:, length:])
