"""The toy world as an arena of closed-loop episodes: a ticket's key is the seed of a table."""

import dataclasses
from typing import Any

import numpy as np

from fusevla.arrays import Float
from fusevla.data.toy import RELATIONS
from fusevla.evaluate.outcome import Ticket
from fusevla.evaluate.rollout import Seen
from fusevla.evaluate.toy_env import ToyEnv

__all__ = ["ToyArena", "relation_of"]


class ToyArena:
    """A table for one episode after another."""

    executed = 2

    def __init__(self) -> None:
        self._env, self._record = ToyEnv(), False
        self._seen: Seen | None = None
        self._info: dict[str, Any] = {}

    def start(self, ticket: Ticket) -> None:
        """A new table of seed ``ticket.key[0]``."""
        observation, self._info = self._env.reset(seed=ticket.key[0])
        self._record, task = ticket.record, self._info["task"]
        names = tuple(f"{color} block" for color in self._info["colors"])
        self._seen = Seen(observation, task, relation_of(task), self._info["plans"], names, frames=self._frames())

    def move(self, actions: Float[np.ndarray, "n 3"]) -> None:
        """Ends with the episode. ValueError where an action is not three finite numbers."""
        self._seen = dataclasses.replace(self.seen(), taken=(), frames=())
        for action in actions:
            if not self._seen.over:
                self._seen = self._step(action, self._seen)

    def poll(self) -> bool:
        """Nothing goes on in the background."""
        return True

    def seen(self) -> Seen:
        """The table as it is. RuntimeError before the first ``start``."""
        if self._seen is None:
            raise RuntimeError("toy: expected start() before anything else")
        return self._seen

    def close(self) -> None:
        """Nothing is open."""

    def _step(self, action: Float[np.ndarray, "3"], seen: Seen) -> Seen:
        held = self._info["held"]
        observation, _, terminated, truncated, self._info = self._env.step(action)
        return dataclasses.replace(
            seen,
            observation=observation,
            placed=self._info["placed"],
            taken=seen.taken + ((f"{self._info['held']} block",) if self._info["held"] not in (None, held) else ()),
            steps=seen.steps + 1,
            over=terminated or truncated,
            success=terminated and self._info["placed"] == len(seen.plans),
            frames=seen.frames + self._frames(),
        )

    def _frames(self) -> tuple[np.ndarray, ...]:
        return (self._env.render(),) if self._record else ()


def relation_of(task: str) -> str:
    """Which of ``RELATIONS`` an instruction has."""
    return next((name for name, (phrase, *_) in RELATIONS.items() if phrase and task.endswith(phrase)), "open")
