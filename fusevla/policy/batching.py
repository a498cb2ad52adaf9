"""Queries of several clients in one forward pass: a bounded queue, and one thread in which the policy runs."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fusevla.policy.policy import Query, Reply

__all__ = ["Batcher", "PolicyError"]

LOG = logging.getLogger(__name__)
Answer = Callable[[Sequence[Query]], Sequence[Reply]]


class PolicyError(RuntimeError):
    """The policy could not answer one query. The text is for the client; the log has the rest."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    query: Query
    reply: asyncio.Future[Reply]


class Batcher:
    """Queries go in one by one (``ask``); up to ``batch_size`` of those that wait are answered at once, oldest first."""

    def __init__(self, policy: Answer, batch_size: int, *, queue_size: int = 64, gather_seconds: float = 0.002):
        """``gather_seconds``: how long a batch that is not full waits for more. A full queue lets ``ask`` wait."""
        self.passes = self.answered = 0
        self.seconds = 0.0
        self._policy, self._batch_size, self._gather = policy, batch_size, gather_seconds
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(queue_size)
        self._thread = ThreadPoolExecutor(1, "policy")
        self._task: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """Queries that wait for a forward pass."""
        return self._queue.qsize()

    async def ask(self, query: Query) -> Reply:
        """Waits for a place in the queue, then for the answer. Cancelled, the query is dropped.

        Raises:
            PolicyError: the policy failed on this query.
        """
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Waiting(query, reply))
        return await reply

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nobody waits any more: the forward pass that runs is left to end by itself."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [waiting for waiting in await self._gathered() if not waiting.reply.done()]
            if not batch:
                continue
            began = time.perf_counter()
            answers = await loop.run_in_executor(self._thread, self._answers, [waiting.query for waiting in batch])
            self.passes, self.answered = self.passes + 1, self.answered + len(batch)
            self.seconds += time.perf_counter() - began
            for waiting, answer in zip(batch, answers, strict=True):
                _resolve(waiting.reply, answer)

    async def _gathered(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        if self._queue.qsize() < self._batch_size - 1:
            await asyncio.sleep(self._gather)
        while len(batch) < self._batch_size and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    def _answers(self, queries: Sequence[Query]) -> list[Reply | PolicyError]:
        """In the thread. Where a batch fails, each is asked alone: one client's query spoils nobody else's."""
        try:
            replies = list(self._policy(queries))
            if len(replies) != len(queries):
                raise RuntimeError(f"policy: expected {len(queries)} replies, got {len(replies)}")
            return [*replies]
        except Exception as error:
            if len(queries) > 1:
                return [answer for query in queries for answer in self._answers([query])]
            LOG.exception("the policy failed on a query")
            told = str(error).partition("\n")[0][:500] if isinstance(error, ValueError) else "internal error"
            return [PolicyError(f"policy: {told}")]


def _resolve(waiting: asyncio.Future[Reply], answer: Reply | PolicyError) -> None:
    if waiting.done():  # its client has gone, or timed out
        return
    if isinstance(answer, PolicyError):
        waiting.set_exception(answer)
    else:
        waiting.set_result(answer)
