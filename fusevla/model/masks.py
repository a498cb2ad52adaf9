"""Who may look at whom: every attention mask and every position of the library is built here.

Rule (big_vision's, via openpi ``pi0.py::make_attn_mask``@15a9616a): token i attends to token j iff both are valid and
``cumsum(ar)[j] <= cumsum(ar)[i]``. ``ar`` is True where a new causal block starts.
"""

import jax.numpy as jnp

from fusevla.arrays import Array, Bool, Int


def attention_mask(valid: Bool[Array, "b s"], ar: Bool[Array, "b s"]) -> Bool[Array, "b s s"]:
    """Query-by-key mask of one sequence. Rows of invalid tokens are all False: their outputs mean nothing."""
    block = jnp.cumsum(ar, axis=1, dtype=jnp.int32)
    causal = block[:, None, :] <= block[:, :, None]
    return causal & valid[:, None, :] & valid[:, :, None]


def positions(valid: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """RoPE positions: the running count of valid tokens, so that padding and masked cameras take up no position."""
    return jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1


def with_action_blocks(
    valid: Bool[Array, "b p"], ar: Bool[Array, "b p"], draws: int, horizon: int
) -> tuple[Bool[Array, "b s s"], Int[Array, "b s"]]:
    """Mask and positions of a prefix followed by ``draws`` action blocks (s = p + draws * horizon).

    Each block is bidirectional in itself, sees every valid token of the prefix, and neither sees another block nor is
    seen by the prefix. All blocks stand at the same positions, so that one draw is exactly the published sequence.
    """
    prefix = valid.shape[1]
    block = jnp.arange(draws * horizon) // horizon
    own = block[:, None] == block[None, :]
    sees_prefix = jnp.broadcast_to(valid[:, None, :], (valid.shape[0], draws * horizon, prefix))
    sees_actions = jnp.broadcast_to(own, (valid.shape[0], *own.shape))
    blind = jnp.zeros((valid.shape[0], prefix, draws * horizon), bool)
    top = jnp.concatenate([attention_mask(valid, ar), blind], axis=2)
    bottom = jnp.concatenate([sees_prefix, sees_actions], axis=2)
    steps = jnp.tile(jnp.arange(horizon, dtype=jnp.int32), draws)
    after = jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None] + steps[None]
    return jnp.concatenate([top, bottom], axis=1), jnp.concatenate([positions(valid), after], axis=1)


def prefix_of(valid: Bool[Array, "b l"], ar: Bool[Array, "b l"]) -> Bool[Array, "b l"]:
    """Which valid text tokens belong to the bidirectional prefix: those before the first causal one."""
    return valid & (jnp.cumsum(ar, axis=1, dtype=jnp.int32) == 0)


def blocks_after_cache(cached: Bool[Array, "b c"], slot: Int[Array, ""] | int, draws: int, horizon: int) -> Bool[Array, "b q c"]:
    """Mask of ``draws`` bidirectional blocks of ``horizon`` tokens written to a cache from ``slot`` on (q = draws * horizon).

    ``cached`` says which slots hold valid tokens already; each block sees those and itself.
    """
    key_block = (jnp.arange(cached.shape[1]) - slot) // horizon
    query_block = jnp.arange(draws * horizon) // horizon
    own = query_block[:, None] == key_block[None, :]
    return cached[:, None, :] | own[None]
