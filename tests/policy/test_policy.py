"""A policy answers each query as if it were alone, in the robot's units, whatever else is in the batch."""

import dataclasses
import functools

import equinox as eqx
import jax
import numpy as np
import pytest

from fusevla.arrays import Array
from fusevla.data.normalize import NormStats
from fusevla.data.prompts import plan_thought
from fusevla.data.toy_text import toy_tokenizer
from fusevla.model import fuse
from fusevla.model.fuse import Pi0Fuse
from fusevla.policy import sampling
from fusevla.policy.agent import MAX_THOUGHTS, Agent
from fusevla.policy.policy import Policy, Query, Reply, merged, policy_of
from fusevla.presets import TOY
from fusevla.tokens.tokenizer import train_tokenizer
from fusevla.train.checkpoint import BaseWeights, RunInfo
from fusevla.train.freeze import has_adapters, partition
from tests.golden_set import BF16, F32, relative_error
from tests.tiny import CONFIG, tiny_batch, tiny_model

THOUGHT = plan_thought(["put the red block in the tray", "put the blue block in the tray"], 1)
RANGE = (np.array([2.0, 0.0, -1.0]), np.array([4.0, 1.0, 1.0]))
STATS = {key: NormStats((RANGE[0] + RANGE[1]) / 2, (RANGE[1] - RANGE[0]) / 2, *RANGE) for key in ("state", "actions")}


@pytest.fixture(scope="module")
def make():
    tokenizer = toy_tokenizer()
    small = dataclasses.replace(
        TOY.model,
        vocab_size=tokenizer.vocab_size,
        language=dataclasses.replace(TOY.model.language, depth=2, lora=None),
        action=dataclasses.replace(TOY.model.action, depth=2, lora=None),
        remat="none",
    )
    preset = dataclasses.replace(TOY, model=small, num_steps=3)
    model = fuse.init(small, jax.random.key(3))
    return lambda size, stats=STATS, **options: Policy(
        model, preset, tokenizer, stats, batch_size=size, max_new_tokens=12, **options
    )


def query(number: int, agent: Agent, wrist: bool = True) -> Query:
    generator = np.random.default_rng(number)
    image = lambda: generator.integers(0, 256, (60, 60, 3), np.uint8)
    images = {"base_0_rgb": image(), "left_wrist_0_rgb": image() if wrist else None}
    return Query(agent, images, generator.uniform(2, 3, 3).astype(np.float32), (number,))


TIRED = Agent("put the red block in the tray", THOUGHT, in_a_row=MAX_THOUGHTS, queries=20)
"""Must act, whatever the model wants; its prompt is longer than a fresh one's."""
QUERIES = [query(0, TIRED), query(1, Agent("put the red block in the tray")), query(2, TIRED, wrist=False)]


def assert_same(one: Reply, other: Reply) -> None:
    assert (one.agent, one.thought) == (other.agent, other.thought)
    assert (one.actions is None) == (other.actions is None)
    if one.actions is not None and other.actions is not None:
        np.testing.assert_allclose(one.actions, other.actions, rtol=2e-5, atol=2e-5)


def test_in_a_batch_as_alone(make) -> None:
    alone, together = make(1), make(4)
    replies = together(QUERIES)
    assert [reply.thought is None for reply in replies] == [True, False, True]
    for asked, reply in zip(QUERIES, replies, strict=True):
        assert_same(alone([asked])[0], reply)
    for asked, reply in zip(QUERIES[::-1], together(QUERIES[::-1]), strict=True):
        assert_same(alone([asked])[0], reply)


def test_acting_and_thinking_apart_is_the_round_in_parts(make) -> None:
    policy = make(4, smaller=(2,), temperature=0.7)
    whole = policy(QUERIES)
    acted = policy.act(QUERIES)
    assert [i for i, reply in acted.items() if reply is None] == [1]
    for i in (0, 2):
        assert_same(acted[i], whole[i])
    steps = list(policy.think(QUERIES[1:2]))
    assert [len(step) for step in steps] == [0, 1]  # 12 tokens in pieces of 8
    assert_same(steps[-1][0], whole[1])
    assert whole[1].thought != make(1)(QUERIES[1:2])[0].thought  # which is greedy
    assert whole[1].thought != policy([dataclasses.replace(QUERIES[1], seed=(9,))])[0].thought


def test_agents_go_on(make) -> None:
    acted, thought, _ = make(3)(QUERIES)
    assert acted.agent == dataclasses.replace(TIRED, in_a_row=0, queries=21)
    assert (thought.agent.in_a_row, thought.agent.queries, thought.agent.malformed) == (1, 1, 1)
    assert thought.agent.prompt == QUERIES[1].agent.prompt


def test_actions_are_in_the_robots_units_and_start_from_the_querys_own_noise(make) -> None:
    raw, scaled = (make(1, stats)(QUERIES[:1])[0].actions for stats in (None, STATS))
    assert raw.shape == scaled.shape == (8, 3)
    assert not np.allclose(raw, scaled)
    again = make(1)([dataclasses.replace(QUERIES[0], seed=(5, 6))])[0].actions
    assert not np.allclose(scaled, again)


def test_normalised_actions_map_to_the_middle_of_the_range(make) -> None:
    """``unnormalize`` of the same chunk by hand."""
    policy = make(1)
    captured, inner = {}, policy._act

    def spy(*args, **kept):
        captured["chunk"] = inner(*args, **kept)
        return captured["chunk"]

    policy._act = spy
    actions = policy(QUERIES[:1])[0].actions
    low, high = RANGE
    expected = (np.asarray(captured["chunk"])[0, 0] + 1) / 2 * (high - low + 1e-6) + low
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 3])
def test_a_round_that_does_not_fit_is_refused(make, count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 2 queries, got {count}"):
        make(2)(QUERIES[:count])


def test_a_state_of_another_robot_is_refused(make) -> None:
    with pytest.raises(ValueError):
        make(1)([dataclasses.replace(QUERIES[0], state=np.zeros(9, np.float32))])


@functools.cache
def trained(dtype: str) -> Pi0Fuse:
    """A tiny model with adapters as training leaves it: frozen weights in bfloat16."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    return eqx.combine(*partition(tiny_model(config), "llm"))


@jax.jit
def heard_and_done(model: Pi0Fuse) -> tuple[Array, Array]:
    """Logits and actions for prompts of two lengths."""
    valid = np.arange(9)[None] < np.array([9, 5])[:, None]
    state = sampling.prefill(model, tiny_batch(valid, np.zeros_like(valid)).observation, 7)
    return state.logits, sampling.act(model, state, jax.random.normal(jax.random.key(1), (2, 1, 4, 5)), 3)


def test_merging_rounds_nothing_away_where_float32_is_computed() -> None:
    model = trained("float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.language)} == {"bfloat16", "float32"}
    for ours, plain in zip(heard_and_done(merged(model)), heard_and_done(model), strict=True):
        assert relative_error(ours, plain) <= 2 * F32


@pytest.mark.slow
def test_merging_is_one_rounding_of_many_where_bfloat16_is_computed() -> None:
    exact = heard_and_done(trained("float32"))
    for ours, plain, true in zip(*map(heard_and_done, (merged(trained("bfloat16")), trained("bfloat16"))), exact, strict=True):
        assert relative_error(ours, plain) <= BF16
        assert relative_error(ours, true) <= 1.5 * relative_error(plain, true)


@pytest.mark.parametrize("merge", [True, False])
def test_a_checkpoints_policy_is_merged_unless_told_otherwise(merge: bool) -> None:
    tokenizer = train_tokenizer(["Instruction: stack. \nPlan: TBD.\n"], state_numbers=False)
    preset = dataclasses.replace(TOY, model=dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
    info = RunInfo(preset, BaseWeights(None, "", stored=True), tokenizer.model_bytes, None)
    policy = policy_of(tiny_model(preset.model), info, **({} if merge else {"merge": False}), batch_size=3)
    assert has_adapters(policy._model) == (not merge)
    assert policy.batch_size == 3
