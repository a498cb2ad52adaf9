"""The server over a real socket, with a policy that is a function: the protocol, who shares a pass, and who harms whom."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fusevla.policy.policy import Query, Reply
from fusevla.policy.server import Options, PolicyServer
from tests.policy.robot import Robot, from_bytes, observation, to_bytes
from tests.policy.serving import METADATA, TAKES, THOUGHT, Stub, gauge, http, serving, until


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


def test_one_who_acts_does_not_wait_for_the_end_of_a_thought() -> None:
    class Dreamer(Stub):
        """A thought has as many pieces as it likes."""

        def think(self, queries: Sequence[Query]) -> Iterator[dict[int, Reply]]:
            while not wake.is_set() and queries[0].agent.task == "dream":
                time.sleep(0.001)
                yield {}
            yield from super().think(queries)

    async def scenario() -> None:
        async with serving(policy, request_timeout=60.0) as (port, _), Robot(port) as awake, Robot(port) as dreamer:
            await awake.ask(observation())
            dreaming = asyncio.create_task(dreamer.ask(observation(prompt="dream", reset=True)))
            for step in range(20):
                assert (await awake.ask(observation(float(step))))["actions"][0, 0] == step
            assert not dreaming.done()
            wake.set()
            assert "no actions after" in await dreaming

    policy, wake = Dreamer(), threading.Event()
    asyncio.run(scenario())


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
