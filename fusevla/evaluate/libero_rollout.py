"""LIBERO as an arena of closed-loop episodes: a simulator in a process of its own, so that many run side by side.

A ticket's key is (seed of the noise, task, initial state).
"""

import dataclasses
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fusevla.arrays import Float
from fusevla.evaluate.libero import LiberoEnv, tasks
from fusevla.evaluate.libero_plan import pick_and_place, spoken
from fusevla.evaluate.outcome import Ticket
from fusevla.evaluate.rollout import Seen

__all__ = ["EXECUTED", "FPS", "LiberoArena", "Simulation"]

EXECUTED = 5
"""Actions done of each chunk, as in published evaluations."""
FPS = 20
"""Actions per second."""


class Simulation:
    """Episodes of a suite in this very process, where nothing else may simulate."""

    def __init__(self, suite: str, assets: Path | None = None) -> None:
        """Raises what ``tasks`` raises."""
        self._tasks, self._assets = tasks(suite), assets
        self._env: LiberoEnv | None = None

    def start(self, ticket: Ticket) -> Seen:
        """The first look. Raises what ``LiberoEnv`` and its ``reset`` raise."""
        _, index, init = ticket.key
        env = self._enter(index)
        self._record, self._nouns = ticket.record, dict[str, str]()
        self._held: str | None = None
        observation = env.reset(init)
        self._seen = Seen(observation, env.task.language, f"{index}: {env.task.language}", (), (), frames=self._frames(env))
        self._plan = pick_and_place(env.task)
        if self._plan is not None:
            others = {name: spoken(name) for name in env.poses() if name != self._plan.target}
            self._nouns = others | {self._plan.item: self._plan.noun}
            self._seen = dataclasses.replace(self._seen, plans=self._plan.plans, names=tuple(self._nouns.values()))
        return self._seen

    def move(self, actions: Float[np.ndarray, "n 7"]) -> Seen:
        """Until the episode is over. Only the last action is looked at, unless there will be a film.

        Raises:
            ValueError: an action is not seven finite numbers.
        """
        env = self._env
        if env is None:
            raise RuntimeError("libero: expected start() before anything else")
        taken, frames = list[str](), list[np.ndarray]()
        for left in reversed(range(len(actions))):
            env.step(actions[len(actions) - 1 - left], look=self._record or left == 0)
            taken += self._newly_held(env)
            frames += self._frames(env)
            if env.over:
                break
        self._seen = dataclasses.replace(
            self._seen,
            observation=env.observation,
            placed=2 if env.success else int(self._plan is not None and self._held == self._plan.item),
            taken=tuple(taken),
            steps=env.steps,
            over=env.over,
            success=env.success,
            frames=tuple(frames),
        )
        return self._seen

    def close(self) -> None:
        """Frees the simulator."""
        if self._env is not None:
            self._env.close()

    def _enter(self, index: int) -> LiberoEnv:
        if self._env is None or self._env.task != self._tasks[index]:
            self.close()
            self._env = LiberoEnv(self._tasks[index], assets=self._assets)
        return self._env

    def _newly_held(self, env: LiberoEnv) -> list[str]:
        """What was grasped by the last action; nobody asks where things have no names."""
        before, self._held = self._held, env.held if self._nouns else None
        return [] if self._held in (None, before) else [self._nouns.get(self._held, spoken(self._held))]

    def _frames(self, env: LiberoEnv) -> tuple[np.ndarray, ...]:
        views = [image for name, image in env.observation.items() if name != "state"]
        return (np.concatenate(views, axis=1),) if self._record else ()


def _serve(pipe: Connection, suite: str, assets: Path | None) -> None:
    """What runs in the process: answers each ticket or chunk of actions with what was seen, or with what went wrong."""
    simulation = Simulation(suite, assets)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the evaluation is gone
            break
        try:
            pipe.send(simulation.start(asked) if isinstance(asked, Ticket) else simulation.move(asked))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    simulation.close()


class LiberoArena:
    """A simulator's process, from the outside. It takes about 2 GB of memory."""

    executed = EXECUTED

    def __init__(self, suite: str, assets: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # neither JAX nor a renderer survives a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, suite, assets), daemon=True)
        self._process.start()
        theirs.close()
        self._ticket: Ticket | None = None

    def start(self, ticket: Ticket) -> None:
        """Begins to build the scene."""
        self._ticket = ticket
        self._send(ticket)

    def move(self, actions: Float[np.ndarray, "n 7"]) -> None:
        """Begins to do these."""
        self._send(actions)

    def poll(self) -> bool:
        """Whether it is done."""
        return self._pipe.poll()

    def seen(self) -> Seen:
        """Waits. RuntimeError where the simulator failed or its process died."""
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            answer = self._died()
        if not isinstance(answer, Seen):
            raise RuntimeError(f"libero: episode {self._ticket and self._ticket.key} failed in the simulator ({answer})")
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()

    def _send(self, asked: object) -> None:
        try:
            self._pipe.send(asked)
        except (BrokenPipeError, ConnectionError) as error:
            raise RuntimeError(f"libero: {self._died()}") from error

    def _died(self) -> str:
        self._process.join(timeout=5)
        return f"its process ended with exit code {self._process.exitcode}; perhaps there is too little memory for so many"
