"""Closed-loop episodes in the toy world: many environments in step, one policy, and what is to be known about each episode."""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from fusevla.arrays import UInt8
from fusevla.data.prompts import DUE, parse_thought, plan_thought
from fusevla.data.toy import subgoal
from fusevla.evaluate.toy_env import ToyEnv
from fusevla.policy.agent import Agent
from fusevla.policy.policy import Answers, Query

__all__ = ["EXECUTED", "Outcome", "Swap", "ThoughtRecord", "play", "swapped_thought"]

Swap = Literal["plan", "due"]
"""What of a thought is made to name another block: the whole plan, or only its last line, which then contradicts the plan."""

EXECUTED = 2
"""Actions done of each chunk before the policy is asked again."""


@dataclasses.dataclass(frozen=True)
class ThoughtRecord:
    """A thought, and whether it was right when it was written."""

    step: int
    text: str
    right: bool
    """It names the sub-goal that is due."""
    exact: bool
    """All of it is what the annotation would say."""


@dataclasses.dataclass
class Outcome:
    """One episode. ``decisions`` counts (what was due, what was done); ``grasps`` lists (taken, what the thought named)."""

    seed: int
    task: str = ""
    success: bool = False
    steps: int = 0
    plans: tuple[str, ...] = ()
    thoughts: list[ThoughtRecord] = dataclasses.field(default_factory=list)
    decisions: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    grasps: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    malformed: int = 0
    swapped_to: str | None = None
    """The sub-goal that was put into the first thought in place of its own."""
    frames: list[tuple[UInt8[np.ndarray, "h w 3"], str]] = dataclasses.field(default_factory=list)
    """What was seen, with the thought at the time; of recorded episodes."""


class _Table:
    """One environment, its agent and what it still has to do."""

    def __init__(self, seed: int, swap: Swap | None, record: bool) -> None:
        self.env, self.record = ToyEnv(), record
        self.swap: Swap | None = swap
        self.observation, self.info = self.env.reset(seed=seed)
        self.agent, self.outcome = Agent(self.info["task"]), Outcome(seed, self.info["task"], plans=self.info["plans"])
        self.pending: deque[np.ndarray] = deque()
        self.over = False
        self._look()

    def query(self) -> Query:
        images = {name: image for name, image in self.observation.items() if name != "state"}
        return Query(self.agent, images, self.observation["state"], (self.outcome.seed, self.agent.queries))

    def due(self) -> str:
        """A thought is due where there is none, or its count of what is done is behind."""
        thought = parse_thought(self.agent.thought or "")
        return "act" if thought is not None and len(thought.done) == self.info["placed"] else "reason"

    def hear(self, text: str, agent: Agent) -> None:
        """After a thought."""
        plans, placed = self.info["plans"], self.info["placed"]
        thought = parse_thought(text)
        right = thought is not None and thought.now == plans[placed]
        self.outcome.thoughts.append(ThoughtRecord(self.outcome.steps, text, right, text == plan_thought(plans, placed)))
        self.agent, self.outcome.malformed = agent, agent.malformed
        if self.swap is not None and self.outcome.swapped_to is None and agent.thought == text:
            text, self.outcome.swapped_to = swapped_thought(text, self.info["colors"], self.swap, self.outcome.seed)
            self.agent = dataclasses.replace(agent, thought=text)

    def move(self) -> None:
        """One action of those that are pending."""
        held = self.info["held"]
        self.observation, _, terminated, truncated, self.info = self.env.step(self.pending.popleft())
        self.outcome.steps += 1
        if self.info["held"] not in (None, held):
            thought = parse_thought(self.agent.thought or "")
            self.outcome.grasps.append((subgoal(self.info["held"]), thought.now if thought else None))
        self.over = terminated or truncated
        self.outcome.success = terminated and self.info["placed"] == len(self.info["plans"])
        self._look()

    def _look(self) -> None:
        if self.record:
            self.outcome.frames.append((self.env.render(), self.agent.thought or ""))


def swapped_thought(text: str, colors: Sequence[str], swap: Swap, seed: int) -> tuple[str, str]:
    """(a thought as well formed as ``text`` whose due sub-goal is another block on the table, that sub-goal); of ``seed``.

    With ``plan`` all of it fits: a block of the plan changes places with the due one, another takes the due one's place.

    Raises:
        ValueError: ``text`` is no thought, or its task is complete.
    """
    thought = parse_thought(text)
    if thought is None or thought.now is None:
        raise ValueError(f"swapped_thought: expected a thought with something due, got {text!r}")
    others = [subgoal(color) for color in colors if subgoal(color) not in (thought.now, *thought.done)]
    other = others[int(np.random.default_rng((seed, 1)).integers(len(others)))]
    if swap == "due":
        return text.replace(f"{DUE}{thought.now}", f"{DUE}{other}"), other
    exchange = {thought.now: other, other: thought.now}
    return plan_thought([exchange.get(plan, plan) for plan in thought.plans], len(thought.done)), other


def play(
    policy: Answers,
    seeds: Sequence[int],
    *,
    swap: Swap | None = None,
    record: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> list[Outcome]:
    """An episode for every seed, ``policy.batch_size`` at a time.

    Args:
        policy: Asked for each table apart from all others: an outcome does not depend on what else is played.
        seeds: Of the tables.
        swap: Make the first thought of every episode name another block.
        record: Keep the frames of so many of the first episodes.
        done: Called with the number of episodes that have just ended.
    """
    waiting = deque((seed, number < record) for number, seed in enumerate(seeds))
    tables: list[_Table] = []
    outcomes: dict[int, Outcome] = {}
    while waiting or tables:
        while waiting and len(tables) < policy.batch_size:
            seed, recorded = waiting.popleft()
            tables.append(_Table(seed, swap, recorded))
        _ask(policy, [table for table in tables if not table.pending])
        for table in tables:
            if table.pending:
                table.move()
        ended = [table for table in tables if table.over]
        outcomes |= {table.outcome.seed: table.outcome for table in ended}
        tables = [table for table in tables if not table.over]
        done(len(ended))
    return [outcomes[seed] for seed in seeds]


def _ask(policy: Answers, tables: Sequence[_Table]) -> None:
    """One round for those that have nothing to do."""
    if not tables:
        return
    for table, reply in zip(tables, policy([table.query() for table in tables]), strict=True):
        table.outcome.decisions[table.due(), "act" if reply.thought is None else "reason"] += 1
        if reply.thought is not None:
            table.hear(reply.thought, reply.agent)
        elif reply.actions is not None:
            table.agent = reply.agent
            table.pending.extend(np.asarray(reply.actions, np.float64)[:EXECUTED])
