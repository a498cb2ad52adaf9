"""An evaluation as a list of episodes and the arenas to play them in; played with progress, films and a journal."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusevla.data.toy import FPS as TOY_FPS
from fusevla.evaluate import libero_rollout
from fusevla.evaluate.film import write_film
from fusevla.evaluate.journal import Journal
from fusevla.evaluate.libero import LiberoEnv, suite_name, tasks
from fusevla.evaluate.libero_init import read_init_states
from fusevla.evaluate.libero_plan import pick_and_place
from fusevla.evaluate.outcome import Outcome, Swap, Ticket
from fusevla.evaluate.rollout import Arena, play
from fusevla.evaluate.toy_rollout import ToyArena
from fusevla.policy.policy import Answers

__all__ = ["Job", "libero_job", "open_journal", "play_all", "toy_job"]

SWAP_KINDS: tuple[Swap, ...] = ("plan", "due")
SWAP_FILMS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be played, and where."""

    name: str
    tickets: tuple[Ticket, ...]
    arena: Callable[[], Arena]
    fps: int
    """Of films."""
    state_dim: int
    action_dim: int


def toy_job(episodes: int, swaps: int, films: int, seed: int) -> Job:
    """``episodes`` tables that nobody has seen; the first ``swaps`` of them again with each kind of wrong thought."""
    keys = [(seed * 1_000_003 + number,) for number in range(max(episodes, swaps))]
    return Job("toy", _tickets(keys[:episodes], keys[:swaps], films), ToyArena, TOY_FPS, state_dim=3, action_dim=3)


def libero_job(
    suite: str,
    chosen: Sequence[int] | None = None,
    *,
    first_init: int = 0,
    episodes: int = 50,
    swaps: int = 0,
    films: int = 1,
    seed: int = 0,
    assets: Path | None = None,
) -> Job:
    """``episodes`` initial states of each chosen task (all by default), and ``swaps`` of them with each kind of wrong thought.

    Raises:
        ValueError: unknown suite or task, or fewer initial states than that.
        ModuleNotFoundError, FileNotFoundError, RuntimeError: the simulator cannot run here, see ``LiberoEnv``.
    """
    found = tasks(suite)
    chosen = range(len(found)) if chosen is None else chosen
    if not chosen or not set(chosen) <= set(range(len(found))):
        raise ValueError(f"{suite_name(suite)}: tasks from 0 to {len(found) - 1} expected, got {list(chosen)}")
    for index in chosen:
        states, last = len(read_init_states(found[index].init_file)), first_init + max(episodes, swaps)
        if not 0 <= first_init < last <= states:
            raise ValueError(
                f"{suite_name(suite)}: task {index} has initial states 0 to {states - 1}; asked for {first_init} to {last - 1}"
            )
    LiberoEnv(found[chosen[0]], assets=assets).close()
    inits = range(first_init, first_init + episodes)
    single = [index for index in chosen if pick_and_place(found[index]) is not None]
    swapped = [(seed, index, init) for init in range(first_init, first_init + swaps) for index in single]
    tickets = _tickets([(seed, index, init) for init in inits for index in chosen], swapped, films * len(chosen))
    arena = lambda: libero_rollout.LiberoArena(suite, assets)
    return Job(suite_name(suite), tickets, arena, libero_rollout.FPS, state_dim=8, action_dim=7)


def _tickets(keys: Sequence[tuple[int, ...]], swap_keys: Sequence[tuple[int, ...]], films: int) -> tuple[Ticket, ...]:
    plain = [Ticket(key, None, n < films) for n, key in enumerate(keys)]
    return (*plain, *(Ticket(key, kind, n < SWAP_FILMS) for kind in SWAP_KINDS for n, key in enumerate(swap_keys)))


def open_journal(job: Job, folder: Path, settings: Mapping[str, Any]) -> Journal:
    """What ``folder`` has already of this job. ValueError where it holds something else; nothing is written yet."""
    tickets = [[*ticket.key, ticket.swap, ticket.record] for ticket in job.tickets]
    return Journal(folder, {"world": job.name, **settings, "tickets": tickets})


def play_all(job: Job, policy: Answers, journal: Journal) -> list[Outcome]:
    """An outcome for every ticket, kept in the journal with its film; those that it has already are not played again.

    Raises:
        RuntimeError: a simulator failed; all other outcomes are kept.
    """
    journal.begin()
    folder, waiting = journal.folder, [ticket for ticket in job.tickets if ticket not in journal.outcomes]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(folder.name, total=len(job.tickets), completed=len(job.tickets) - len(waiting))

        def ended(outcome: Outcome) -> None:
            if outcome.frames:
                outcome.film = f"{outcome.ticket.name}.mp4"
                write_film(folder / outcome.film, outcome.frames, job.fps)
                outcome.frames.clear()
            journal.add(outcome)
            bar.update(shown, advance=1, description=_so_far(folder.name, journal))

        with _arenas(job, min(policy.batch_size, len(waiting))) as arenas:
            play(policy, arenas, waiting, ended)
    return [journal.outcomes[ticket] for ticket in job.tickets]


def _so_far(name: str, journal: Journal) -> str:
    plain = [outcome.success for outcome in journal.outcomes.values() if outcome.ticket.swap is None]
    return f"{name}: success in {sum(plain)} of {len(plain)}"


@contextlib.contextmanager
def _arenas(job: Job, count: int) -> Iterator[list[Arena]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(job.arena())) for _ in range(count)]
