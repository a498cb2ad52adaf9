"""Many demonstrations by several processes, each try kept as a file when it is done, so that nothing is lost or done twice."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import numpy as np

from fusevla.evaluate.libero import LiberoEnv, Task
from fusevla.evaluate.libero_demos import Take, demonstrate, replay
from fusevla.evaluate.libero_plan import pick_and_place
from fusevla.files import write_whole

__all__ = ["Order", "Try", "collect", "successes"]


@dataclasses.dataclass(frozen=True)
class Order:
    """What is wanted: ``episodes`` successes of each task from the initial states ``inits``, in turns."""

    episodes: int
    inits: range
    seed: int
    folder: Path
    """Where tries are kept."""
    assets: Path | None
    workers: int

    @property
    def most_tries(self) -> int:
        """Per task, before it is given up."""
        return 2 * self.episodes + 10


@dataclasses.dataclass(frozen=True)
class Try:
    """Number ``number`` of a task: the initial state follows from it, and how it is done from it and the seed."""

    task: Task
    number: int

    def path(self, folder: Path, success: bool = True) -> Path:
        """Of the take, or of the empty file that stands for a failure."""
        name = f"{self.task.suite}_task_{self.task.index:02d}_try_{self.number:05d}"
        return folder / f"{name}.{'npz' if success else 'failed'}"

    def known(self, folder: Path) -> bool | None:
        """Whether it succeeded; None before it was made."""
        return next((success for success in (True, False) if self.path(folder, success).exists()), None)

    def init(self, order: Order) -> int:
        """Its initial state."""
        return order.inits[self.number % len(order.inits)]


def collect(order: Order, tasks: Sequence[Task], done: Callable[[Try, bool], None]) -> None:
    """Makes tries until every task has its successes in ``order.folder`` or has used up its tries.

    Which tries count does not depend on the number of workers: those are made that doing one after another would have made.

    Args:
        order: What is wanted.
        tasks: Pick-and-place tasks.
        done: Told of every try, also of those that were there before.

    Raises:
        RuntimeError: a process died, or a success could not be repeated.
    """
    order.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a renderer does not survive a fork
    tallies = {task: _Tally(order.episodes) for task in tasks}

    def settle(attempt: Try, success: bool) -> None:
        tallies[attempt.task].missing += not success
        done(attempt, success)

    with ProcessPoolExecutor(order.workers, mp_context=context, initializer=_quiet) as pool:
        running: dict[Future[bool], Try] = {}
        try:
            while True:
                for attempt in (attempt for task in tasks for attempt in tallies[task].due(task, order.most_tries)):
                    if (known := attempt.known(order.folder)) is None:
                        running[pool.submit(_make, attempt, order)] = attempt
                    else:
                        settle(attempt, known)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    settle(running.pop(future), future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass
class _Tally:
    """Of a task: successes neither there nor under way, and tries begun."""

    missing: int
    made: int = 0

    def due(self, task: Task, most: int) -> Iterator[Try]:
        """One try for every success that is missing."""
        while self.missing > 0 and self.made < most:
            self.missing, self.made = self.missing - 1, self.made + 1
            yield Try(task, self.made - 1)


def successes(order: Order, tasks: Sequence[Task]) -> Iterator[tuple[Task, Take]]:
    """The takes of the set, task by task in the order of their tries; one is read at a time."""
    for task in tasks:
        attempts = (Try(task, number) for number in range(order.most_tries))
        found = [attempt for attempt in attempts if attempt.known(order.folder)]
        for attempt in found[: order.episodes]:
            yield task, Take.load(attempt.path(order.folder))


def _quiet() -> None:
    """An interrupt is the parent's affair; the simulator's chatter is nobody's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)


def _make(attempt: Try, order: Order) -> bool:
    """Physics first; what succeeds is done again before the cameras, and kept."""
    task, plan = attempt.task, pick_and_place(attempt.task)
    assert plan is not None
    rng = np.random.default_rng((order.seed, task.index, attempt.number))
    with closing(LiberoEnv(task, cameras=False, assets=order.assets)) as env:
        demonstration = demonstrate(env, plan, attempt.init(order), rng)
    if demonstration is None:
        write_whole(attempt.path(order.folder, success=False), b"")
        return False
    with closing(LiberoEnv(task, assets=order.assets)) as env:
        frames = replay(env, demonstration)
    Take(frames, demonstration.grasp, demonstration.release).save(attempt.path(order.folder))
    return True
