"""A small client of the tests' own: openpi-client's bytes without openpi-client, and what it says on the wire."""

import functools
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

TASK = "stack the red block on the blue block"


def _array_to_map(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
    return {b"__npgeneric__": True, b"data": x.item(), b"dtype": x.dtype.str}


def _map_to_array(x: Any) -> Any:
    if b"__ndarray__" in x:
        return np.ndarray(buffer=x[b"data"], dtype=np.dtype(x[b"dtype"]), shape=x[b"shape"])
    return np.dtype(x[b"dtype"]).type(x[b"data"]) if b"__npgeneric__" in x else x


to_bytes = functools.partial(msgpack.packb, default=_array_to_map)
from_bytes = functools.partial(msgpack.unpackb, object_hook=_map_to_array)


def observation(state: float = 0.0, **changed: Any) -> dict[str, Any]:
    """One of the tests' robot: two cameras, three joints."""
    image = np.full((12, 16, 3), 7, np.uint8)
    values = {
        "observation/image": image,
        "observation/wrist_image": image,
        "observation/state": np.full(3, state),
        "prompt": TASK,
    }
    return {**values, **changed}


class Robot:
    """One connection; ``async with Robot(port) as robot``."""

    def __init__(self, port: int, token: str | None = None):
        headers = None if token is None else {"Authorization": f"Api-Key {token}"}
        self._connecting = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, additional_headers=headers)
        self.metadata: dict[str, Any] = {}
        self.socket: ClientConnection

    async def __aenter__(self) -> "Robot":
        self.socket = await self._connecting.__aenter__()
        self.metadata = from_bytes(await self.socket.recv())
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._connecting.__aexit__(*error)

    async def ask(self, message: Any) -> Any:
        """The reply; a ``str`` is an error. ``message``: a value to pack, or a frame as it is (bytes or text)."""
        await self.socket.send(message if isinstance(message, bytes | str) else to_bytes(message))
        reply = await self.socket.recv()
        return reply if isinstance(reply, str) else from_bytes(reply)
