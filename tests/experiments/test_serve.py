"""The script: what it refuses at once, and a real (tiny, untrained) policy behind it until a signal comes."""

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.serve import Args, is_loopback, main, serve, warm_up
from fusevla.data.normalize import NormStats
from fusevla.policy.messages import Takes, metadata, takes
from fusevla.policy.policy import Policy
from fusevla.presets import PRESETS
from fusevla.tokens.tokenizer import train_tokenizer
from tests.experiments.help_text import ROOT, help_without
from tests.policy.robot import Robot, observation
from tests.tiny import CONFIG, tiny_model

SCRIPT = str(ROOT / "experiments" / "serve.py")


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Three joints in, two numbers out; one text bucket, compiled once for all tests here."""
    tokenizer = train_tokenizer(["Instruction: stack. \nPlan: TBD.\n"], state_numbers=False)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    data = dataclasses.replace(PRESETS["toy"].data, text_buckets=(48,), max_token_len=48)
    preset = dataclasses.replace(PRESETS["toy"], model=config, data=data)
    one = lambda dim: NormStats(*(np.full(dim, value) for value in (0.0, 1.0, -2.0, 2.0)))
    stats = {"state": one(3), "actions": one(2)}
    policy = Policy(tiny_model(config), preset, tokenizer, stats, batch_size=2, smaller=(1,), max_new_tokens=4)
    assert warm_up(policy) == [48]
    return policy


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    said = help_without(SCRIPT, ("jax", "numpy", "websockets", "msgpack"))
    assert all(flag in said for flag in ("--checkpoint", "--port", "--host", "--token", "--expose-thinking"))


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: object) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_bad_flags_are_listed_at_once(tmp_path: Path, monkeypatch, capsys) -> None:
    flags = ["--checkpoint", tmp_path / "none", "--port", 70000, "--batch", 0, "--token", "a b", "--gather-ms", -1]
    lines = refused(monkeypatch, capsys, *flags)
    assert [line.split(":")[1].strip() for line in lines] == ["--checkpoint", "--port", "--token", "--batch", "--gather-ms"]


def test_a_folder_that_holds_no_checkpoint(tmp_path: Path, monkeypatch, capsys) -> None:
    (line,) = refused(monkeypatch, capsys, "--checkpoint", tmp_path)
    assert line.startswith("error: ")
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("robot.lab", False)],
)
def test_who_can_reach_it(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_what_the_policy_takes_is_told_and_checked(policy: Policy, monkeypatch) -> None:
    assert takes(policy) == Takes(("base_0_rgb", "left_wrist_0_rgb"), (3, 3))
    keys = ["prompt", "observation/state", "observation/image", "observation/wrist_image"]
    said = metadata(policy, expose_thinking=True)
    assert (said["observation_keys"], said["state_dim"], said["action_dim"], said["action_horizon"]) == (keys, 3, 2, 4)
    monkeypatch.setattr(policy, "stats", None)  # raw values: any state that the model has room for
    assert takes(policy).state_dims == (1, 5)
    assert metadata(policy, expose_thinking=False)["action_dim"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_policy_until_a_signal_comes(number: int, capsys: pytest.CaptureFixture[str], policy: Policy) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(serve(Args(Path("unused"), port=0, batch=2), policy))
        said = ""
        while "listening on ws://127.0.0.1:" not in said:
            await asyncio.sleep(0.01)
            assert not running.done()
            said += capsys.readouterr().out
        async with Robot(int(said.strip().rpartition(":")[2])) as robot:
            assert robot.metadata == metadata(policy, expose_thinking=False)
            first, second = await robot.ask(observation()), await robot.ask(observation())
            assert first["actions"].shape == second["actions"].shape == (4, 2)
            assert first["thought"] == ""  # an untrained model's are no thoughts
            os.kill(os.getpid(), number)
            async with asyncio.timeout(10):
                await running

    asyncio.run(scenario())
    assert "stopping" in capsys.readouterr().out
