"""The think/act state machine against a loop written out by hand, and the text of thoughts there and back."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.prompts import initial_content, parse_thought, plan_thought, with_instruction
from fusevla.policy.agent import MAX_THOUGHTS, Agent

PLANS = st.lists(st.text("abc ", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=1, max_size=4)
THINK, ACT = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
GOOD = plan_thought(["put it down"], 0)


@given(PLANS, st.data())
def test_a_thought_is_read_as_it_was_made(plans: list[str], data: st.DataObject) -> None:
    done = data.draw(st.integers(0, len(plans)))
    found = parse_thought(plan_thought(plans, done))
    assert found is not None
    assert found.plans == tuple(plans)
    assert found.done == tuple(plans[:done])
    assert found.now == (plans[done] if done < len(plans) else None)


@pytest.mark.parametrize(
    "text", ["", "Plan: 1. a", "Plan: TBD.\n What I have done: TBD.\nNow I need to do: TBD.\n", GOOD + GOOD, GOOD[5:], GOOD[:-14]]
)
def test_what_is_no_thought_is_none(text: str) -> None:
    assert parse_thought(text) is None


def test_the_first_query_thinks_and_the_thought_follows_the_instruction() -> None:
    agent = Agent("stack")
    assert agent.prompt == initial_content("stack")
    assert agent.decide(ACT) == "reason"
    thought = agent.after_thought(GOOD, finished=True)
    assert thought.prompt == with_instruction("stack", GOOD)
    assert (thought.decide(ACT), thought.decide(THINK)) == ("act", "reason")
    assert thought.after_action().prompt == thought.prompt
    assert agent == Agent("stack")


@pytest.mark.parametrize(("text", "finished"), [(GOOD, False), ("red red red", True), ("", True)])
def test_malformed_thoughts_are_counted_and_forgotten(text: str, finished: bool) -> None:
    first = Agent("stack").after_thought(GOOD, finished=True)
    assert first.after_thought(text, finished) == dataclasses.replace(first, in_a_row=2, queries=2, malformed=1)
    fresh = Agent("stack").after_thought(text, finished)
    assert fresh.prompt == initial_content("stack")
    assert fresh.decide(ACT) == "act"  # the model is asked again, not forced again


@given(st.lists(st.booleans(), max_size=40))
def test_any_model_acts_at_least_every_eleventh_query(wants: list[bool]) -> None:
    agent, row = Agent("stack"), 0
    for number, think in enumerate(wants):
        choice = agent.decide(THINK if think else ACT)
        assert choice == ("reason" if number == 0 or (think and row < MAX_THOUGHTS) else "act")
        row = row + 1 if choice == "reason" else 0
        agent = agent.after_thought(GOOD, True) if choice == "reason" else agent.after_action()
        assert (agent.in_a_row, agent.queries) == (row, number + 1)
