"""Closed-loop episodes: many arenas, one policy, and what is to be known about each episode. The arenas differ, this does not."""

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from fusevla.arrays import Float, UInt8
from fusevla.data.prompts import DUE, parse_thought, plan_thought
from fusevla.evaluate.outcome import Outcome, Swap, ThoughtRecord, Ticket
from fusevla.policy.agent import Agent
from fusevla.policy.policy import Answers, Query

__all__ = ["Arena", "Seen", "play", "swapped_thought"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What became of an episode since it was last heard of. But for ``observation`` and ``task`` it is for judges only."""

    observation: Mapping[str, np.ndarray]
    """Cameras, and ``state``."""
    task: str
    group: str
    """What the episode is counted under."""
    plans: tuple[str, ...]
    """True sub-goals, in order; none where nobody knows."""
    names: tuple[str, ...]
    """Things that can be taken, as thoughts call them; none where nobody knows."""
    placed: int = 0
    """Sub-goals done."""
    taken: tuple[str, ...] = ()
    """Names of what was grasped."""
    steps: int = 0
    over: bool = False
    success: bool = False
    frames: tuple[UInt8[np.ndarray, "h w 3"], ...] = ()
    """For a film, where that was asked for."""


@runtime_checkable
class Arena(Protocol):
    """A place where episodes are played one after another; ``start`` and ``move`` may go on in the background."""

    executed: int
    """Actions done of each chunk before the policy is asked again."""

    def start(self, ticket: Ticket) -> None:
        """Begin an episode."""

    def move(self, actions: Float[np.ndarray, "n a"]) -> None:
        """Do these, until the episode is over."""

    def poll(self) -> bool:
        """Whether ``seen`` would answer at once."""
        ...

    def seen(self) -> Seen:
        """What became of the last ``start`` or ``move``; waits for it."""
        ...

    def close(self) -> None:
        """No more episodes."""


class _Episode:
    """An agent in an arena, and the record of it."""

    def __init__(self, ticket: Ticket, seen: Seen) -> None:
        self.ticket, self.agent, self.seen = ticket, Agent(seen.task), seen
        wanted = _named(seen.plans[0], seen.names) if seen.plans else None
        self.outcome = Outcome(ticket, seen.task, seen.group, wanted=wanted)
        self.saw(seen)

    def query(self) -> Query:
        images = {name: image for name, image in self.seen.observation.items() if name != "state"}
        return Query(self.agent, images, self.seen.observation["state"], (*self.ticket.key, self.agent.queries))

    def due(self) -> str:
        """A thought is due where there is none, or its count of what is done is not right."""
        if not self.seen.plans:
            return "unknown"
        thought = parse_thought(self.agent.thought or "")
        return "act" if thought is not None and len(thought.done) == self.seen.placed else "reason"

    def hear(self, text: str, agent: Agent) -> None:
        """After a thought."""
        self.outcome.thoughts.append(_judged(text, self.seen))
        self.agent, self.outcome.malformed = agent, agent.malformed
        if self.ticket.swap is not None and len(self.outcome.thoughts) == 1 and agent.thought == text:
            swap = swapped_thought(text, self.seen.names, self.ticket.swap, self.ticket.key)
            if swap is not None:
                text, self.outcome.swapped_to = swap
                self.agent = dataclasses.replace(agent, thought=text)

    def saw(self, seen: Seen) -> None:
        """After the arena moved on."""
        self.seen, outcome = seen, self.outcome
        thought = parse_thought(self.agent.thought or "")
        named = _named(thought.now, seen.names) if thought is not None and thought.now is not None else None
        outcome.grasps += [(taken, named) for taken in seen.taken]
        outcome.frames += [(frame, self.agent.thought or "") for frame in seen.frames]
        outcome.steps, outcome.success = seen.steps, seen.success


@dataclasses.dataclass
class _Slot:
    """An arena, and the episode in it."""

    arena: Arena
    ticket: Ticket | None = None
    episode: _Episode | None = None
    pending: bool = False
    """The arena has something to do."""

    def start(self, ticket: Ticket) -> None:
        self.ticket, self.episode, self.pending = ticket, None, True
        self.arena.start(ticket)

    def look(self) -> None:
        seen, self.pending = self.arena.seen(), False
        if self.episode is None and self.ticket is not None:
            self.episode = _Episode(self.ticket, seen)
        elif self.episode is not None:
            self.episode.saw(seen)

    def end(self) -> Outcome | None:
        """The outcome of an episode that is over, which leaves the arena free."""
        if self.episode is None or not self.episode.seen.over:
            return None
        outcome, self.ticket, self.episode = self.episode.outcome, None, None
        return outcome


def play(
    policy: Answers, arenas: Sequence[Arena], tickets: Iterable[Ticket], ended: Callable[[Outcome], None] = lambda outcome: None
) -> dict[Ticket, Outcome]:
    """An episode for every ticket.

    Args:
        policy: Asked for each episode apart from all others: an outcome does not depend on what else is played.
        arenas: So many episodes are played at a time, at most ``policy.batch_size``.
        tickets: Episodes to play.
        ended: Called with each outcome as soon as it is known.

    Raises:
        ValueError: more arenas than the policy answers at a time.
    """
    if len(arenas) > policy.batch_size:
        raise ValueError(f"play: expected at most {policy.batch_size} arenas for this policy, got {len(arenas)}")
    waiting, slots = deque(tickets), [_Slot(arena) for arena in arenas]
    outcomes: dict[Ticket, Outcome] = {}
    while True:
        for slot in slots:
            if slot.ticket is None and waiting:
                slot.start(waiting.popleft())
        for slot in _to_look_at(slots):
            slot.look()
        for outcome in filter(None, [slot.end() for slot in slots]):
            outcomes[outcome.ticket] = outcome
            ended(outcome)
        if not waiting and all(slot.ticket is None for slot in slots):
            return outcomes
        _ask(policy, [slot for slot in slots if slot.episode is not None and not slot.pending])


def _to_look_at(slots: Sequence[_Slot]) -> list[_Slot]:
    """All that move, so that they are asked in one batch; starting takes long and is only waited for where nobody moves."""
    moving = [slot for slot in slots if slot.pending and slot.episode is not None]
    starting = [slot for slot in slots if slot.pending and slot.episode is None]
    idle = not moving and not any(slot.episode for slot in slots)
    return moving + ([slot for slot in starting if slot.arena.poll()] or (starting[:1] if idle else []))


def _ask(policy: Answers, slots: Sequence[_Slot]) -> None:
    """One round for those that have nothing to do."""
    asked = [(slot, slot.episode) for slot in slots if slot.episode is not None]
    if not asked:
        return
    for (slot, episode), reply in zip(asked, policy([episode.query() for _, episode in asked]), strict=True):
        episode.outcome.decisions[episode.due(), "act" if reply.thought is None else "reason"] += 1
        if reply.thought is not None:
            episode.hear(reply.thought, reply.agent)
        elif reply.actions is not None:
            episode.agent, slot.pending = reply.agent, True
            slot.arena.move(np.asarray(reply.actions, np.float64)[: slot.arena.executed])


def _judged(text: str, seen: Seen) -> ThoughtRecord:
    if not seen.plans:
        return ThoughtRecord(seen.steps, text, None, None)
    thought, due = parse_thought(text), (*seen.plans, None)[seen.placed]
    right = thought is not None and thought.now == due
    return ThoughtRecord(seen.steps, text, right, text == plan_thought(seen.plans, seen.placed))


def _named(text: str, names: Sequence[str]) -> str | None:
    """The first of ``names`` in a text (the longest, where two begin there)."""
    found = _any_of(names).search(text)
    return found[0] if found else None


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Whole words; the longest where two begin; nothing where there are no names."""
    return re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def swapped_thought(text: str, names: Sequence[str], swap: Swap, key: Sequence[int]) -> tuple[str, str] | None:
    """(a thought as well formed as ``text`` in which another thing is due, that thing); drawn by ``key``.

    With ``plan`` all of it fits: the two things change places everywhere. None where ``text`` is no thought, nothing is due in
    it, or there is nothing else to name.
    """
    thought = parse_thought(text)
    own = _named(thought.now, names) if thought is not None and thought.now is not None else None
    if thought is None or thought.now is None or own is None:
        return None
    others = [name for name in names if _named("\n".join([thought.now, *thought.done]), [name]) is None]
    if not others:
        return None
    other = others[int(np.random.default_rng((*key, 1)).integers(len(others)))]
    if swap == "due":
        before, due, after = text.rpartition(DUE)
        return before + due + _any_of([own]).sub(other, after), other
    exchange = {own: other, other: own}
    return _any_of(exchange).sub(lambda found: exchange[found[0]], text), other
