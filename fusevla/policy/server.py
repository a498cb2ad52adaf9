"""The policy behind a websocket, in openpi-client's protocol: one agent per connection, all of them in shared forward passes.

On connect the server sends a metadata map; then every request is a binary msgpack frame and gets one. An error is a text frame
with a message, then the connection is closed with code 1011: that client's alone. ``GET /healthz`` and ``/metrics`` answer
plain HTTP on the same port. The event loop only moves messages; the forward pass has a thread of its own.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import http
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from fusevla.policy.agent import MAX_THOUGHTS
from fusevla.policy.batching import ActsAndThinks, Batcher, PolicyError
from fusevla.policy.messages import Request, Session, Takes, acted, parse_request, thinking
from fusevla.policy.policy import Reply
from fusevla.policy.wire import WireError, pack, unpack

__all__ = ["Options", "PolicyServer"]

LOG = logging.getLogger(__name__)
_LIBRARY = logging.getLogger(f"{__name__}.websockets")
_LIBRARY.setLevel(logging.CRITICAL)  # what strangers send instead of a handshake is no news


@dataclasses.dataclass(frozen=True)
class Options:
    """How the server treats its clients; times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    token: str | None = None
    """Expected as ``Authorization: Api-Key TOKEN`` of everything but /healthz."""
    expose_thinking: bool = False
    """Thoughts are replies of their own; else the server thinks until there are actions."""
    max_connections: int = 256
    max_request_bytes: int = 16 << 20
    queue_size: int = 64
    gather_seconds: float = 0.002
    """How long a forward pass with room waits for more queries."""
    request_timeout: float = 120.0
    """From a whole request to its answer, the queue included."""
    send_timeout: float = 20.0
    idle_timeout: float = 3600.0
    """Between requests."""
    grace: float = 20.0
    """What a request that is being answered gets at shutdown."""
    seed: int = 0


class PolicyServer:
    """Serves a ``Policy``, or a script in its place; ``run`` does it all."""

    def __init__(self, policy: ActsAndThinks, wanted: Takes, metadata: Mapping[str, Any], options: Options):
        """``wanted`` is what requests are checked against, ``metadata`` the map that connections begin with."""
        self.counts: Counter[str] = Counter()
        self._options, self._wanted, self._metadata = options, wanted, pack(dict(metadata))
        self._batcher = Batcher(policy, queue_size=options.queue_size, gather_seconds=options.gather_seconds)
        self._open: set[ServerConnection] = set()
        self._idle: set[ServerConnection] = set()
        self._numbers = itertools.count()
        self._stopping = False

    async def run(self, stop: asyncio.Event, ready: Callable[[int], None] = lambda port: None) -> None:
        """Serves until ``stop`` is set, then answers what was asked and closes. ``ready`` is told the port.

        Raises:
            OSError: the address is in use or not this machine's.
        """
        options = self._options
        async with self._batcher:
            server = await serve(
                self._handle,
                options.host,
                options.port,
                compression=None,
                max_size=options.max_request_bytes,
                max_queue=1,
                process_request=self._before_handshake,
                logger=_LIBRARY,
                server_header=None,
            )
            try:
                ready(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
            finally:
                await self._shut_down(server)

    async def _shut_down(self, server: WebsocketServer) -> None:
        self._stopping = True
        server.close(close_connections=False)
        await asyncio.gather(*(connection.close(1001, "server is shutting down") for connection in self._idle))
        try:
            async with asyncio.timeout(self._options.grace):
                await server.wait_closed()
        except TimeoutError:
            LOG.warning("%d clients are cut off", len(self._open))
            for connection in self._open:
                connection.transport.abort()

    def _before_handshake(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answers plain HTTP and turns away who may not, or cannot, come in; None lets the handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self.counts["refused_token"] += 1
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Expected the header Authorization: Api-Key TOKEN.\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics())
        if _is_foreign_page(request):
            self.counts["refused_origin"] += 1
            return connection.respond(http.HTTPStatus.FORBIDDEN, "Expected a robot, not a page of another site.\n")
        if len(self._open) >= self._options.max_connections:
            self.counts["refused_full"] += 1
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many clients; try again later.\n")
        return None

    def _authorized(self, request: HttpRequest) -> bool:
        if self._options.token is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self._options.token}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected)

    def metrics(self) -> str:
        """Prometheus's text format."""
        batcher = self._batcher
        passes = {"passes": batcher.passes, "pass_seconds": round(batcher.seconds, 3), "queries": batcher.answered}
        totals = {**self.counts, **passes}
        gauges = {"connections": len(self._open), "queued_queries": batcher.queued}
        lines = [f"# TYPE fusevla_{name}_total counter\nfusevla_{name}_total {value}" for name, value in sorted(totals.items())]
        lines += [f"# TYPE fusevla_{name} gauge\nfusevla_{name} {value}" for name, value in gauges.items()]
        return "\n".join(lines) + "\n"

    async def _handle(self, connection: ServerConnection) -> None:
        """One client from its metadata to its end; nothing that happens here reaches another."""
        number = next(self._numbers)
        self.counts["connections"] += 1
        LOG.info("client %d: connected from %s", number, connection.remote_address)
        self._open.add(connection)
        try:
            await self._converse(connection, Session((self._options.seed, number)))
        except ConnectionClosed:
            pass
        except (WireError, PolicyError) as error:
            await self._refuse(connection, number, type(error).__name__, str(error))
        except TimeoutError:
            await self._refuse(connection, number, "timeout", f"no answer within {self._options.request_timeout:g} s")
        except Exception:
            LOG.exception("client %d", number)
            await self._refuse(connection, number, "internal", "internal error")
        finally:
            self._open.discard(connection)
            LOG.info("client %d: gone", number)

    async def _refuse(self, connection: ServerConnection, number: int, kind: str, message: str) -> None:
        self.counts[f"errors_{kind.lower()}"] += 1
        LOG.info("client %d: %s", number, message)
        with contextlib.suppress(ConnectionClosed):
            await self._send(connection, message)
            await connection.close(1011, "Internal server error. Message in the previous frame.")

    async def _converse(self, connection: ServerConnection, session: Session) -> None:
        await self._send(connection, self._metadata)
        timing: dict[str, float] = {}
        while not self._stopping:
            data = await self._receive(connection)
            if data is None:
                await connection.close(1001, "idle for too long")
                return
            began = time.perf_counter()
            async with asyncio.timeout(self._options.request_timeout):
                session, answer = await self._answer(connection, session, data, timing)
            await self._send(connection, answer)
            timing = {"prev_total_ms": 1000 * (time.perf_counter() - began)}
        await connection.close(1001, "server is shutting down")

    async def _receive(self, connection: ServerConnection) -> str | bytes | None:
        """The next frame; None after too long a silence."""
        self._idle.add(connection)
        try:
            async with asyncio.timeout(self._options.idle_timeout):
                return await connection.recv()
        except TimeoutError:
            return None
        finally:
            self._idle.discard(connection)

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        """A client that does not read what it asked for is cut off."""
        try:
            async with asyncio.timeout(self._options.send_timeout):
                await connection.send(message)
        except TimeoutError:
            connection.transport.abort()

    async def _answer(
        self, connection: ServerConnection, session: Session, data: str | bytes, timing: Mapping[str, float]
    ) -> tuple[Session, bytes]:
        """``timing`` is of the request before, as openpi's server tells it."""
        if isinstance(data, str):
            raise WireError("request: expected a binary frame of msgpack, got text")
        began = time.perf_counter()
        request = await asyncio.to_thread(lambda: parse_request(unpack(data), self._wanted))
        self.counts["requests"] += 1
        if request.task is None:
            return session.forgotten(), pack({"reset": True, "server_timing": dict(timing)})
        session, reply = await self._ask(connection, session, request)
        timing = {"infer_ms": 1000 * (time.perf_counter() - began), **timing}
        if reply.actions is None:
            return session, pack(thinking(reply, timing))
        return session, pack(acted(reply, timing, self._options.expose_thinking))

    async def _ask(self, connection: ServerConnection, session: Session, request: Request) -> tuple[Session, Reply]:
        """Once where thoughts are shown, else until there are actions."""
        query = session.query(request)
        for _ in range(MAX_THOUGHTS + 2):
            reply = await self._batcher.ask(query)
            session = session.after(request, reply)
            self.counts["thoughts" if reply.actions is None else "actions"] += 1
            self.counts["malformed_thoughts"] += reply.agent.malformed - query.agent.malformed
            if reply.actions is not None and not np.isfinite(reply.actions).all():
                raise PolicyError("policy: actions that are not finite")
            if reply.actions is not None or self._options.expose_thinking:
                return session, reply
            if connection.state is not State.OPEN:
                raise PolicyError("client: gone while the policy was thinking")
            query = dataclasses.replace(query, agent=reply.agent, seed=(*session.seed, session.asked))
        raise PolicyError(f"policy: no actions after {MAX_THOUGHTS + 2} thoughts")


def _is_foreign_page(request: HttpRequest) -> bool:
    """Whether a browser asks on behalf of another site: any page that is read on this machine could reach the loopback."""
    origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
    return any(origin.partition("://")[2] not in hosts for origin in origins)
