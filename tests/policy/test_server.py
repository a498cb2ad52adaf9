"""The server over a real socket, with a policy that is a function: the protocol, who shares a pass, and who harms whom."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from fusevla.data.prompts import plan_thought
from fusevla.policy.agent import MAX_THOUGHTS
from fusevla.policy.messages import Takes
from fusevla.policy.policy import Query, Reply
from fusevla.policy.server import Options, PolicyServer
from tests.policy.robot import TASK, Robot, from_bytes, observation, to_bytes

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
        return Reply(query.agent.after_action(), actions=np.full((4, 2), fill, np.float32))

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


def test_thinking_stays_inside_and_every_reply_has_actions() -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, _), Robot(port) as robot:
            assert robot.metadata == METADATA
            first, second = await robot.ask(observation(1.0)), await robot.ask(observation(2.0))
        assert list(first) == ["actions", "thought", "server_timing"]
        np.testing.assert_array_equal(first["actions"], np.full((4, 2), 1, np.float32))
        assert first["actions"].dtype == np.float32
        assert first["thought"] == second["thought"] == THOUGHT
        assert (second["actions"] == 2).all()
        assert list(first["server_timing"]) == ["infer_ms"]
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"] > 0

    policy = Stub()
    asyncio.run(scenario())
    queries = [query for batch in policy.batches for query in batch]
    assert len(queries) == 3  # a thought, actions, actions
    assert len({query.seed for query in queries}) == 3
    assert queries[0].images["base_0_rgb"].shape == (12, 16, 3)


def test_exposed_thoughts_are_replies_of_their_own() -> None:
    async def scenario() -> None:
        async with serving(Stub(), expose_thinking=True) as (port, _), Robot(port) as robot:
            first, second = await robot.ask(observation()), await robot.ask(observation())
        assert (first["isthinking"], first["thought"], "actions" in first) == (True, THOUGHT, False)
        assert (second["isthinking"], second["thought"], second["actions"].shape) == (False, THOUGHT, (4, 2))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("messages", "fresh"),
    [
        ([observation(), observation()], 1),
        ([observation(), observation(reset=False)], 1),
        ([observation(), observation(reset=True)], 2),
        ([observation(), observation(prompt="other"), observation(prompt="other")], 2),
        ([observation(), observation(prompt="other"), observation()], 3),
        ([observation(is_warm_up=True), observation()], 2),
        ([observation(), observation(is_warm_up=True), observation()], 3),
        ([observation(), {"reset": True}, observation()], 2),
    ],
)
def test_what_begins_anew(messages: list[dict[str, Any]], fresh: int) -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, _):
            async with Robot(port) as robot:
                for message in messages:
                    reply = await robot.ask(message)
                    assert ("actions" in reply) == ("prompt" in message)
            before = policy.fresh
            async with Robot(port) as robot:
                await robot.ask(messages[-1])
            assert (before, policy.fresh) == (fresh, fresh + 1)  # and so does a new connection

    policy = Stub()
    asyncio.run(scenario())


def test_queries_that_wait_share_a_pass_and_everyone_gets_their_own_answer() -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, _), contextlib.AsyncExitStack() as stack:
            robots = [await stack.enter_async_context(Robot(port)) for _ in range(6)]
            policy.go_on.clear()
            first = asyncio.create_task(robots[0].ask(observation(0.0)))
            await until(lambda: policy.sizes == [1])
            others = [asyncio.create_task(robot.ask(observation(float(i)))) for i, robot in enumerate(robots[1:], 1)]
            while await gauge(port, "queued_queries") < 5:
                await asyncio.sleep(0.002)
            policy.go_on.set()
            replies = await asyncio.gather(first, *others)
        assert [reply["actions"][0, 0] for reply in replies] == [0, 1, 2, 3, 4, 5]

    policy = Stub(4)
    asyncio.run(scenario())
    assert policy.sizes[:2] == [1, 4]
    assert sum(policy.sizes) == 12


BAD = {
    "garbage": (b"\xc1garbage", "msgpack"),
    "text": ("hello", "binary"),
    "a list": ([1, 2], "map"),
    "nothing": ({}, "missing"),
    "no state": ({key: value for key, value in observation().items() if "state" not in key}, "observation/state"),
    "no camera": ({key: value for key, value in observation().items() if "wrist" not in key}, "observation/wrist_image"),
    "flat image": (observation(**{"observation/image": np.zeros((4, 4), np.uint8)}), "observation/image"),
    "four channels": (observation(**{"observation/image": np.zeros((5, 5, 4), np.uint8)}), "observation/image"),
    "empty image": (observation(**{"observation/image": np.zeros((0, 5, 3), np.uint8)}), "observation/image"),
    "endless image": (observation(**{"observation/image": np.zeros((5000, 1, 3), np.uint8)}), "observation/image"),
    "integer image": (observation(**{"observation/image": np.zeros((5, 5, 3), np.int64)}), "observation/image"),
    "bright image": (observation(**{"observation/image": np.full((5, 5, 3), 255.0)}), "observation/image"),
    "wrong state": (observation(**{"observation/state": np.zeros(4)}), "expected 3 finite numbers; got 4"),
    "nan state": (observation(np.nan), "not all finite"),
    "huge state": (observation(1e300), "not all finite"),
    "state of text": (observation(**{"observation/state": np.array(["a"] * 3)}), "observation/state"),
    "state matrix": (observation(**{"observation/state": np.zeros((1, 3))}), "observation/state"),
    "no prompt": (observation(prompt=" "), "prompt"),
    "long prompt": (observation(prompt="a" * 1001), "prompt"),
    "number as prompt": (observation(prompt=4), "prompt"),
    "reset is a text": (observation(reset="yes"), "reset"),
    "object": (to_bytes({"x": {b"__ndarray__": True, b"data": b"12345678", b"dtype": "|O", b"shape": [1]}}), "dtype"),
    "thinks for ever": (observation(prompt="dream"), f"no actions after {MAX_THOUGHTS + 2} thoughts"),
    "not finite": (observation(prompt="nan"), "not finite"),
    "policy refuses": (observation(prompt="too long"), "text: expected fewer words"),
    "policy crashes": (observation(prompt="crash"), "internal error"),
}


def test_errors_are_told_to_their_client_and_end_its_connection_alone() -> None:
    async def bad(port: int, message: Any, told: str) -> None:
        async with Robot(port) as robot:
            reply = await robot.ask(message)
            assert isinstance(reply, str)
            assert told in reply
            assert not any(word in reply for word in ("Traceback", ".py", "secret", "second line"))
            with pytest.raises(ConnectionClosedError) as closed:
                await robot.socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1011

    async def scenario() -> None:
        async with serving(Stub()) as (port, _), Robot(port) as bystander:
            await bystander.ask(observation())
            for message, told in BAD.values():
                await bad(port, message, told)
                assert (await bystander.ask(observation(5.0)))["actions"][0, 0] == 5
            metrics = (await http(port, "/metrics"))[1]
        assert "fusevla_errors_wireerror_total 22\n" in metrics
        assert "fusevla_errors_policyerror_total 4\n" in metrics
        assert "fusevla_connections 1\n" in metrics

    asyncio.run(scenario())


def test_one_clients_query_spoils_no_batch() -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, _), contextlib.AsyncExitStack() as stack:
            robots = [await stack.enter_async_context(Robot(port)) for _ in range(4)]
            policy.go_on.clear()
            prompts = [TASK, "crash", "too long", TASK]
            asked = [asyncio.create_task(r.ask(observation(prompt=p))) for r, p in zip(robots, prompts, strict=True)]
            await until(lambda: bool(policy.sizes))
            while sum(policy.sizes) + await gauge(port, "queued_queries") < 4:
                await asyncio.sleep(0.002)
            policy.go_on.set()
            replies = await asyncio.gather(*asked)
        assert [reply if isinstance(reply, str) else reply["actions"].shape for reply in replies] == [
            (4, 2),
            "policy: internal error",
            "policy: text: expected fewer words",
            (4, 2),
        ]

    policy = Stub()
    asyncio.run(scenario())


def test_too_large_and_no_websocket_at_all() -> None:
    async def scenario() -> None:
        async with serving(Stub(), max_request_bytes=4096) as (port, _), Robot(port) as bystander:
            async with Robot(port) as robot:
                with pytest.raises(ConnectionClosed) as closed:
                    await robot.ask(bytes(5000))
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1009
            for sent in (b"\0\xff\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                assert b"101 Switching" not in await reader.read()
                writer.close()
            assert (await bystander.ask(observation()))["actions"].shape == (4, 2)

    asyncio.run(scenario())


def test_the_token_guards_all_but_healthz() -> None:
    async def scenario() -> None:
        async with serving(Stub(), token="sesame") as (port, _):
            for wrong in (None, "sesam", "Sesame"):
                with pytest.raises(InvalidStatus) as refused:
                    async with Robot(port, wrong):
                        pass
                assert refused.value.response.status_code == 401
            async with Robot(port, "sesame") as robot:
                assert (await robot.ask(observation()))["actions"].shape == (4, 2)
            assert await http(port, "/healthz") == ("HTTP/1.1 200 OK", "OK\n")
            assert (await http(port, "/metrics"))[0] == "HTTP/1.1 401 Unauthorized"
            assert (await http(port, "/metrics", "Authorization: Api-Key s\u00e9same"))[0] == "HTTP/1.1 401 Unauthorized"
            status, body = await http(port, "/metrics", "Authorization: Api-Key sesame")
        assert status == "HTTP/1.1 200 OK"
        assert "# TYPE fusevla_actions_total counter\nfusevla_actions_total 1\n" in body
        assert "fusevla_refused_token_total 5\n" in body

    asyncio.run(scenario())


def test_a_client_that_leaves_while_the_policy_thinks() -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, _), Robot(port) as bystander:
            policy.go_on.clear()
            async with Robot(port) as robot:
                await robot.socket.send(to_bytes(observation()))
                await until(lambda: policy.sizes == [1])
                robot.socket.transport.abort()
            policy.go_on.set()
            assert (await bystander.ask(observation()))["actions"].shape == (4, 2)
            while await gauge(port, "connections") > 1:
                await asyncio.sleep(0.002)

    policy = Stub()
    asyncio.run(scenario())
    assert sum(policy.sizes) == 3  # nobody thinks on for who has gone


def test_no_more_clients_than_allowed_and_none_for_ever() -> None:
    async def scenario() -> None:
        async with serving(Stub(), max_connections=1, idle_timeout=0.05) as (port, _), Robot(port) as robot:
            with pytest.raises(InvalidStatus) as refused:
                async with Robot(port):
                    pass
            assert refused.value.response.status_code == 503
            with pytest.raises(ConnectionClosed) as closed:
                await robot.socket.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "idle for too long")

    asyncio.run(scenario())


def test_a_full_queue_lets_clients_wait_until_their_time_is_up() -> None:
    async def scenario() -> None:
        async with (
            serving(policy, queue_size=1, request_timeout=0.2) as (port, _),
            contextlib.AsyncExitStack() as stack,
        ):
            robots = [await stack.enter_async_context(Robot(port)) for _ in range(4)]
            policy.go_on.clear()
            replies = await asyncio.gather(*(robot.ask(observation()) for robot in robots))
            assert replies == ["no answer within 0.2 s"] * 4
            policy.go_on.set()
            async with Robot(port) as robot:
                assert (await robot.ask(observation()))["actions"].shape == (4, 2)

    policy = Stub(1)
    asyncio.run(scenario())
    assert policy.sizes == [1, 1, 1]  # who gave up is not asked about


def test_shutting_down_answers_what_was_asked() -> None:
    async def scenario() -> None:
        async with serving(policy) as (port, shut_down), Robot(port) as idle, Robot(port) as busy:
            policy.go_on.clear()
            asked = asyncio.create_task(busy.ask(observation(3.0)))
            await until(lambda: policy.sizes == [1])
            threading.Timer(0.1, policy.go_on.set).start()
            await asyncio.gather(shut_down(), asked)
            assert asked.result()["actions"][0, 0] == 3
            for robot in (idle, busy):
                with pytest.raises(ConnectionClosed) as closed:
                    await robot.socket.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1001
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    policy = Stub()
    asyncio.run(scenario())


def test_shutting_down_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        server = PolicyServer(policy, TAKES, METADATA, Options(port=0, grace=0.05))
        running = asyncio.create_task(server.run(stop, port.set_result))
        async with Robot(await port) as robot:
            policy.go_on.clear()
            await robot.socket.send(to_bytes(observation()))
            await until(lambda: policy.sizes == [1])
            stop.set()
            async with asyncio.timeout(5):
                await running
            with pytest.raises(ConnectionClosed):
                await robot.socket.recv()
        policy.go_on.set()

    policy = Stub(1)
    asyncio.run(scenario())


def test_sixty_four_clients_of_which_every_fourth_is_hostile() -> None:
    async def friendly(port: int, number: int) -> int:
        async with Robot(port) as robot:
            for step in range(4):
                reply = await robot.ask(observation(float(100 * number + step)))
                assert (reply["actions"] == 100 * number + step).all()
        return 4

    async def hostile(port: int, number: int) -> int:
        async with Robot(port) as robot:
            messages = [message for message, _ in BAD.values()]
            assert isinstance(await robot.ask(messages[number % len(messages)]), str)
        return 0

    async def scenario() -> int:
        async with serving(policy, queue_size=8) as (port, _):
            return sum(await asyncio.gather(*((friendly if i % 4 else hostile)(port, i) for i in range(64))))

    policy = Stub(16)
    assert asyncio.run(scenario()) == 48 * 4
    assert max(policy.sizes) > 4


def test_floats_and_channels_first_are_what_openpi_takes_too() -> None:
    async def scenario() -> None:
        image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
        changed = {"observation/image": np.moveaxis(image, 2, 0), "observation/wrist_image": np.full((5, 6, 3), 0.5, np.float32)}
        async with serving(policy) as (port, _), Robot(port) as robot:
            await robot.ask(observation(**changed))
            await robot.ask(observation(**{"observation/wrist_image": None, "observation/state": [1, 2.0, np.float32(3)]}))
        first, last = policy.batches[0][0], policy.batches[-1][0]
        np.testing.assert_array_equal(first.images["base_0_rgb"], image)
        np.testing.assert_array_equal(first.images["left_wrist_0_rgb"], np.full((5, 6, 3), 127, np.uint8))
        assert last.images["left_wrist_0_rgb"] is None
        np.testing.assert_array_equal(last.state, [1, 2, 3])

    policy = Stub()
    asyncio.run(scenario())


def test_replies_can_be_read_without_this_package() -> None:
    async def scenario() -> None:
        async with serving(Stub()) as (port, _), Robot(port) as robot:
            await robot.socket.send(to_bytes(observation()))
            frame = await robot.socket.recv()
        assert isinstance(frame, bytes)
        assert frame.startswith(b"\x83\xa7actions\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x20")
        assert from_bytes(frame)["actions"].shape == (4, 2)

    asyncio.run(scenario())
