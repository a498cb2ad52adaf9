"""Serve a trained policy to robots, in the websocket protocol of openpi's client.

    python experiments/serve.py --checkpoint runs/toy/checkpoints --port 8000
    python experiments/serve.py --checkpoint runs/libero10 --host 0.0.0.0 --token SECRET --batch 8

Clients are openpi-client's WebsocketClientPolicy (host, port, api_key) or anything that speaks it: msgpack maps with
observation/image, observation/wrist_image, observation/state and prompt. By default the server thinks by itself and every
reply has actions; with --expose-thinking a new thought is a reply of its own and the client asks again. A new connection, a
changed prompt or reset=True begins a new task. GET /healthz and /metrics tell how it is. Ctrl-C or SIGTERM answers what was
asked, then stops; a second one stops at once.
"""

import asyncio
import dataclasses
import ipaddress
import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from fusevla.policy.policy import Policy
    from fusevla.policy.server import PolicyServer


@dataclasses.dataclass(frozen=True)
class Args:
    """Serve a trained policy."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The output folder of a training run, or the checkpoints folder in it."""
    step: int | None = None
    """Which checkpoint; the latest by default."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every network, best with --token."""
    port: int = 8000
    """0 takes any free one."""
    token: str | None = None
    """Clients must send it as Authorization: Api-Key TOKEN."""
    expose_thinking: bool = False
    """Answer with {isthinking, thought} when the policy thinks, instead of thinking until there are actions."""
    batch: int = 4
    """Queries of different clients in one forward pass. A pass costs as much as a full one, except for a single query."""
    gather_ms: float = 2.0
    """How long a pass that is not full waits for more queries."""
    max_connections: int = 256
    """Clients beyond are turned away."""
    max_request_mb: float = 16.0
    """Larger requests are refused."""
    queue: int = 64
    """Queries that may wait, of those who act and of those who think each; further clients wait to be heard."""
    timeout: float = 120.0
    """Seconds until a request that has no answer fails."""
    idle_timeout: float = 3600.0
    """Seconds after which a silent client is let go."""
    warm_up: bool = True
    """Compile for every length of text before listening; else the first requests wait for it."""
    temperature: float = 0.0
    """Of thoughts; 0 always writes the likeliest token."""
    merge_lora: bool = True
    """Add the adapters to their weights: quicker, and the same up to the rounding of the dtype that the model computes in."""
    seed: int = 0
    """Of the noise that actions start from, and of thoughts that are drawn."""


def check(args: Args) -> list[str]:
    """What is wrong with the flags."""
    wrong = []
    if not args.checkpoint.is_dir():
        wrong.append(f"--checkpoint: {args.checkpoint} is no folder; expected a training run's output")
    if not 0 <= args.port < 65536:
        wrong.append(f"--port: expected 0 to 65535, got {args.port}")
    token = args.token
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        wrong.append("--token: expected ASCII characters without spaces, at least one")
    positive = ("batch", "max_connections", "max_request_mb", "queue", "timeout", "idle_timeout")
    bounds = [(name, "more than 0", getattr(args, name) > 0) for name in positive]
    bounds += [(name, "0 or more", getattr(args, name) >= 0) for name in ("gather_ms", "temperature")]
    wrong += [f"--{name.replace('_', '-')}: expected {bound}" for name, bound, good in bounds if not good]
    return wrong


def load(args: Args) -> "Policy":
    """The policy of the checkpoint, compiled for one query and for ``--batch``. Raises ``CheckpointError``."""
    from fusevla.compile_cache import use_compile_cache
    from fusevla.policy.load import load_policy
    from fusevla.policy.policy import policy_of

    model, info = load_policy(args.checkpoint, args.step)
    use_compile_cache()
    policy = policy_of(model, info, merge=args.merge_lora, batch_size=args.batch, smaller=(1,), temperature=args.temperature)
    if args.warm_up:
        began = time.perf_counter()
        lengths = ", ".join(map(str, warm_up(policy)))
        print(f"compiled for texts of up to {lengths} tokens in {time.perf_counter() - began:.1f} s", flush=True)
    return policy


def warm_up(policy: "Policy") -> list[int]:
    """A thought and a chunk of actions for one query and for many, for each text bucket that a prompt can fall into.

    Returns the buckets.
    """
    import numpy as np

    from fusevla.data.batch import bucket_for
    from fusevla.data.samples import prompt_sample
    from fusevla.policy.agent import MAX_THOUGHTS, Agent
    from fusevla.policy.messages import takes
    from fusevla.policy.policy import Query

    data, model, wanted = policy.preset.data, policy.preset.model, takes(policy)
    images = {camera: np.zeros((8, 8, 3), np.uint8) for camera in wanted.cameras}
    state = np.zeros(wanted.state_dims[1], np.float32)
    done: list[int] = []
    for words in range(1, max(data.text_buckets)):
        thinks = Agent("move " * words)
        sample = prompt_sample(images, state, thinks.prompt, policy.tokenizer, policy.stats, data, model)
        bucket = bucket_for(len(sample.text.tokens), data.text_buckets)
        if bucket not in done:
            acts = dataclasses.replace(thinks, in_a_row=MAX_THOUGHTS)
            for agent in (thinks, acts):
                for size in {1, policy.batch_size}:
                    policy([Query(agent, images, state)] * size)
            done.append(bucket)
        if bucket == max(data.text_buckets):
            break
    return done


def make_server(args: Args, policy: "Policy") -> "PolicyServer":
    """The server around it."""
    from fusevla.policy.messages import metadata, takes
    from fusevla.policy.server import Options, PolicyServer

    options = Options(
        host=args.host,
        port=args.port,
        token=args.token,
        expose_thinking=args.expose_thinking,
        max_connections=args.max_connections,
        max_request_bytes=int(args.max_request_mb * 2**20),
        queue_size=args.queue,
        gather_seconds=args.gather_ms / 1000,
        request_timeout=args.timeout,
        idle_timeout=args.idle_timeout,
        seed=args.seed,
    )
    return PolicyServer(policy, takes(policy), metadata(policy, args.expose_thinking), options)


async def serve(args: Args, policy: "Policy") -> None:
    """Until SIGINT or SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop_once() -> None:
        print("stopping: answering what was asked ...", flush=True)
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_once)
    if not is_loopback(args.host) and args.token is None:
        print(f"warning: anyone who reaches {args.host} may use this policy; give a --token", file=sys.stderr)
    await make_server(args, policy).run(stop, lambda port: print(f"listening on ws://{args.host}:{port}", flush=True))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    wrong = check(args)
    if wrong:
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        sys.exit(2)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("fusevla").setLevel(logging.INFO)
    from fusevla.model.fetch import CheckpointError

    try:
        asyncio.run(serve(args, load(args)))
    except KeyboardInterrupt:  # while it loads and compiles; later it is a signal to stop
        sys.exit(130)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
