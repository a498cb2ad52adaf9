"""A policy that is a function, and a server around it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np

from fusevla.data.prompts import plan_thought
from fusevla.policy.messages import Takes
from fusevla.policy.policy import Query, Reply
from fusevla.policy.server import Options, PolicyServer

TAKES = Takes(("base_0_rgb", "left_wrist_0_rgb"), (3, 3))
METADATA = {"policy": "stub", "action_dim": 2}
THOUGHT = plan_thought(["move"], 0)


class Stub:
    """Thinks on the first query, then acts: every action is the first number of the state. Remembers the batches."""

    def __init__(self, batch_size: int = 8) -> None:
        self.batch_size = batch_size
        self.batches: list[list[Query]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def act(self, queries: Sequence[Query]) -> dict[int, Reply | None]:
        self._hear(queries)
        return {i: None if query.agent.task == "dream" else self._acted(query) for i, query in enumerate(queries)}

    def think(self, queries: Sequence[Query]) -> Iterator[dict[int, Reply]]:
        self._hear(queries)
        yield {i: Reply(query.agent.after_thought(THOUGHT, True), thought=THOUGHT) for i, query in enumerate(queries)}

    def _hear(self, queries: Sequence[Query]) -> None:
        assert 0 < len(queries) <= self.batch_size
        self.batches.append(list(queries))
        assert self.go_on.wait(20)
        tasks = {query.agent.task for query in queries}
        if "too long" in tasks:
            raise ValueError("text: expected fewer words\nsecond line")
        if "crash" in tasks:
            raise RuntimeError("a secret path")

    def _acted(self, query: Query) -> Reply:
        fill = np.nan if query.agent.task == "nan" else query.state[0]
        steps = 1 << 22 if query.agent.task == "much" else 4
        return Reply(query.agent.after_action(), actions=np.full((steps, 2), fill, np.float32))

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    @property
    def fresh(self) -> int:
        """Agents that began anew."""
        return sum(query.agent.queries == 0 for batch in self.batches for query in batch)


@contextlib.asynccontextmanager
async def serving(policy: Stub, **options: Any) -> AsyncIterator[tuple[int, Callable[[], Coroutine]]]:
    """(port, a function that shuts down); no client's connection is left when it has returned."""
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = PolicyServer(policy, TAKES, METADATA, Options(port=0, **options))
    task = asyncio.create_task(server.run(stop, port.set_result))

    async def shut_down() -> None:
        policy.go_on.set()
        stop.set()
        async with asyncio.timeout(10):
            await task

    try:
        yield await port, shut_down
    finally:
        await shut_down()


async def http(port: int, path: str, *headers: str) -> tuple[str, str]:
    """(status line, body) of a bare GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head.splitlines()[0], body


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def gauge(port: int, name: str) -> int:
    lines = (await http(port, "/metrics"))[1].splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"fusevla_{name} "))
