"""A policy answers each query as if it were alone, in the robot's units, whatever else is in the batch."""

import dataclasses

import jax
import numpy as np
import pytest

from fusevla.data.normalize import NormStats
from fusevla.data.prompts import plan_thought
from fusevla.data.toy_text import toy_tokenizer
from fusevla.model import fuse
from fusevla.policy.agent import MAX_THOUGHTS, Agent
from fusevla.policy.policy import Policy, Query, Reply
from fusevla.presets import TOY

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
    return lambda size, stats=STATS: Policy(model, preset, tokenizer, stats, batch_size=size, max_new_tokens=12)


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

    def spy(*args):
        captured["chunk"] = inner(*args)
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
