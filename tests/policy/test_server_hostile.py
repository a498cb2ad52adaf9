"""Clients that do what they should not: they are told, and nobody else notices."""

import asyncio
import contextlib
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from fusevla.policy.agent import MAX_THOUGHTS
from tests.policy.robot import TASK, Robot, from_bytes, observation, to_bytes
from tests.policy.serving import METADATA, Stub, gauge, http, serving, until

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
    "endless prompt": (observation(prompt="a" * 100_000), "prompt: expected a text of 1 to 1000 characters, got 100000"),
    "endless list": (observation(more=[0] * 3000), "lists of at most 1024"),
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
        assert "fusevla_errors_wireerror_total 24\n" in metrics
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


def test_pages_of_other_sites_are_turned_away() -> None:
    async def scenario() -> None:
        async with serving(Stub()) as (port, _):
            page = lambda origin: connect(f"ws://127.0.0.1:{port}", additional_headers={"Origin": origin})
            async with page(f"http://127.0.0.1:{port}") as socket:
                assert from_bytes(await socket.recv()) == METADATA
            for foreign in ("https://evil.example", "null"):
                with pytest.raises(InvalidStatus) as refused:
                    async with page(foreign):
                        pass
                assert refused.value.response.status_code == 403

    asyncio.run(scenario())


def test_one_who_does_not_read_is_cut_off() -> None:
    async def scenario() -> None:
        async with serving(Stub(), send_timeout=0.1) as (port, _), Robot(port) as robot:
            robot.socket.transport.pause_reading()
            await robot.socket.send(to_bytes(observation(prompt="much")))
            async with asyncio.timeout(10):
                while await gauge(port, "connections"):
                    await asyncio.sleep(0.01)
            assert await gauge(port, "actions_total") == 1
            robot.socket.transport.abort()

    asyncio.run(scenario())


async def friendly(port: int, number: int, requests: int) -> None:
    async with Robot(port) as robot:
        for step in range(requests):
            reply = await robot.ask(observation(float(1000 * number + step)))
            assert (reply["actions"] == 1000 * number + step).all()


async def hostile(port: int, number: int, visits: int) -> None:
    """Comes again and again, each time with another trick."""
    messages = [message for message, _ in BAD.values()]
    for visit in range(visits):
        trick = (number + visit) % 5
        async with Robot(port) as robot:
            if trick == 0:
                assert isinstance(await robot.ask(messages[(number + 7 * visit) % len(messages)]), str)
            elif trick == 1:
                with pytest.raises(ConnectionClosed):
                    await robot.ask(bytes(LARGEST + 1))
            elif trick == 2:  # leaves in the middle of a frame that says it is longer
                robot.socket.transport.write(b"\x82\xfe\x10\x00" + b"mask" + bytes(100))
                robot.socket.transport.abort()
            elif trick == 3:  # leaves before the answer
                await robot.socket.send(to_bytes(observation()))
                robot.socket.transport.abort()
            else:  # asks and asks, and reads nothing
                robot.socket.transport.pause_reading()
                for _ in range(20):
                    await robot.socket.send(to_bytes(observation()))
                await asyncio.sleep(0.05)
                robot.socket.transport.abort()


LARGEST = 1 << 16


def besieged(requests: int, visits: int, rounds: int) -> list[int]:
    """48 clients who work and 16 who do not, ``rounds`` times; the server's memory in kilobytes after each."""

    async def scenario() -> list[int]:
        taken = []
        async with serving(policy, queue_size=8, max_request_bytes=LARGEST, send_timeout=0.2) as (port, _):
            for _ in range(rounds):
                good = (friendly(port, i, requests) for i in range(48))
                await asyncio.gather(*good, *(hostile(port, i, visits) for i in range(16)))
                policy.batches.clear()
                while await gauge(port, "connections"):
                    await asyncio.sleep(0.01)
                assert await gauge(port, "queued_queries") == 0
                gc.collect()
                taken.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4 if Path("/proc/self/statm").exists() else 0)
        return taken

    policy = Stub(16)
    return asyncio.run(scenario())


def test_sixty_four_clients_of_which_every_fourth_is_hostile() -> None:
    besieged(requests=4, visits=2, rounds=1)


@pytest.mark.slow
def test_a_long_siege_leaves_no_trace_in_memory() -> None:
    taken = besieged(requests=20, visits=5, rounds=6)
    assert taken[-1] <= 1.05 * taken[1]
