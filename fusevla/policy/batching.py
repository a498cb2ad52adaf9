"""Queries of several clients in shared passes: bounded queues, and one thread in which the policy runs.

Those who act and those who think wait in lines of their own. A pass for the first and a piece of the thoughts take turns in
the thread, so that nobody who acts waits for the end of a thought.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from fusevla.policy.policy import Query, Reply

__all__ = ["ActsAndThinks", "Batcher", "PolicyError"]

LOG = logging.getLogger(__name__)


@runtime_checkable
class ActsAndThinks(Protocol):
    """What is served: a ``Policy``, or a script in its place. Both take at most ``batch_size`` queries and answer by index."""

    batch_size: int

    def act(self, queries: Sequence[Query]) -> Mapping[int, Reply | None]:
        """Actions, or None for who would rather think."""
        ...

    def think(self, queries: Sequence[Query]) -> Iterator[Mapping[int, Reply]]:
        """Thoughts as they come to their ends; the thread may do something else between two steps."""
        ...


class PolicyError(RuntimeError):
    """The policy could not answer one query. The text is for the client; the log has the rest."""


Found = Mapping[int, Reply | PolicyError | None]
"""By index, of some queries of a batch."""
Work = Callable[[Sequence[Query]], Iterator[Found]]
"""What a batch takes; every step of it is one turn of the thread."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    query: Query
    reply: asyncio.Future[Reply | None]


class Batcher:
    """Queries go in one by one (``ask``); up to ``batch_size`` of those in a line are answered at once, oldest first."""

    def __init__(self, policy: ActsAndThinks, *, queue_size: int = 64, gather_seconds: float = 0.002):
        """Two lines of ``queue_size``: a full one lets ``ask`` wait. A batch with room waits ``gather_seconds`` for more."""
        self.passes = self.answered = 0
        self.seconds = 0.0
        self._policy, self._gather = policy, gather_seconds
        self._acting: asyncio.Queue[_Waiting] = asyncio.Queue(queue_size)
        self._thinking: asyncio.Queue[_Waiting] = asyncio.Queue(queue_size)
        self._thread = ThreadPoolExecutor(1, "policy")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def queued(self) -> int:
        """Queries that wait for a pass."""
        return self._acting.qsize() + self._thinking.qsize()

    async def ask(self, query: Query) -> Reply:
        """Waits for a place in a line, then for the answer. Cancelled, the query is dropped.

        Raises:
            PolicyError: the policy failed on this query.
        """
        reply = None if query.agent.must_think else await self._wait(self._acting, query)
        reply = await self._wait(self._thinking, query) if reply is None else reply
        assert reply is not None
        return reply

    async def _wait(self, line: asyncio.Queue[_Waiting], query: Query) -> Reply | None:
        waiting = _Waiting(query, asyncio.get_running_loop().create_future())
        await line.put(waiting)
        return await waiting.reply

    async def __aenter__(self) -> "Batcher":
        act: Work = lambda queries: iter([self._policy.act(queries)])
        self._tasks = [
            asyncio.create_task(self._run(self._acting, act)),
            asyncio.create_task(self._run(self._thinking, self._policy.think)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nobody waits any more: what runs in the thread is left to end by itself."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, line: asyncio.Queue[_Waiting], work: Work) -> None:
        """Serves a line for ever."""
        while True:
            batch = [waiting for waiting in await self._gathered(line) if not waiting.reply.done()]
            self.passes, self.answered = self.passes + bool(batch), self.answered + len(batch)
            steps = _guarded(work, [waiting.query for waiting in batch])
            while not all(waiting.reply.done() for waiting in batch):  # also where clients have gone
                for index, answer in (await self._step(steps)).items():
                    _resolve(batch[index].reply, answer)

    async def _step(self, steps: Iterator[Found]) -> Found:
        def step() -> Found:
            began = time.perf_counter()
            answers = next(steps)
            self.seconds += time.perf_counter() - began
            return answers

        return await asyncio.get_running_loop().run_in_executor(self._thread, step)

    async def _gathered(self, line: asyncio.Queue[_Waiting]) -> list[_Waiting]:
        batch = [await line.get()]
        if line.qsize() < self._policy.batch_size - 1:
            await asyncio.sleep(self._gather)
        while len(batch) < self._policy.batch_size and not line.empty():
            batch.append(line.get_nowait())
        return batch


def _guarded(work: Work, queries: Sequence[Query]) -> Iterator[Found]:
    """In the thread. Where a batch fails, each is asked alone: one client's query spoils nobody else's."""
    unanswered = set(range(len(queries)))
    try:
        for found in work(queries):
            unanswered -= found.keys()
            yield found
        if unanswered:
            raise RuntimeError(f"policy: {len(unanswered)} of {len(queries)} queries have no answer")
    except Exception as error:
        if len(queries) == 1:
            LOG.exception("the policy failed on a query")
            told = str(error).partition("\n")[0][:500] if isinstance(error, ValueError) else "internal error"
            yield {0: PolicyError(f"policy: {told}")}
            return
        for index in sorted(unanswered):
            for found in _guarded(work, [queries[index]]):
                yield {index: found[0]} if found else {}


def _resolve(waiting: asyncio.Future[Reply | None], answer: Reply | PolicyError | None) -> None:
    if waiting.done():  # its client has gone, or timed out
        return
    if isinstance(answer, PolicyError):
        waiting.set_exception(answer)
    else:
        waiting.set_result(answer)
