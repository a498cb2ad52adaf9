import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.data.annotations import load_annotations
from fusevla.data.batch import SampleSource, collate
from fusevla.data.lerobot import open_set
from fusevla.data.loader import Loader, global_order, make_loader
from fusevla.data.normalize import compute_norm_stats
from fusevla.presets import LIBERO10
from fusevla.train.material import make_tokenizer, set_texts, with_vocabulary


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source whose samples say what was asked for, and in which process they were made."""

    size: int
    bad: int = -1

    def __len__(self) -> int:
        return self.size

    def __call__(self, row: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        if row == self.bad:
            raise ValueError(f"row {row} is damaged")
        noise = np.random.default_rng([row, epoch, seed]).normal(size=3)
        return {"row": np.array([row, epoch, seed]), "noise": noise, "process": np.array(os.getpid())}


def stack(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def take(loader: Loader[dict[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    with loader:
        return list(itertools.islice(loader, count))


def assert_same(left: Sequence[dict[str, np.ndarray]], right: Sequence[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["row"], b["row"])
        np.testing.assert_array_equal(a["noise"], b["noise"])


def rows(batches: Sequence[dict[str, np.ndarray]]) -> list[tuple[int, int]]:
    return [(int(row), int(epoch)) for batch in batches for row, epoch, _ in batch["row"]]


def test_every_epoch_visits_every_row_once_in_another_order() -> None:
    batches = take(make_loader(Numbers(10), stack, batch_size=4, seed=7), 10)
    order = rows(batches)
    epochs = [[row for row, epoch in order if epoch == e] for e in range(4)]
    assert [epoch for _, epoch in order] == sorted(epoch for _, epoch in order)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert {int(seed) for batch in batches for seed in batch["row"][:, 2]} == {7}


def test_seed_decides_the_order() -> None:
    first, second, third = (take(make_loader(Numbers(50), stack, batch_size=8, seed=seed), 6) for seed in (0, 0, 1))
    assert_same(first, second)
    assert rows(first) != rows(third)


@pytest.mark.parametrize("workers", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_change_nothing(workers: int) -> None:
    """All but the first batch come from them: that one is made while they start."""
    expected = take(make_loader(Numbers(11), stack, batch_size=3, seed=5, start_step=2), 9)
    batches = take(make_loader(Numbers(11), stack, batch_size=3, seed=5, start_step=2, workers=workers), 9)
    assert_same(expected, batches)
    first, *others = [{int(process) for process in batch["process"]} for batch in batches]
    assert first == {os.getpid()}
    assert len(set.union(*others)) == workers
    assert os.getpid() not in set.union(*others)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 9), start=st.integers(0, 60), seed=st.integers(0, 2**31))
def test_resume_from_the_step_alone(size: int, batch: int, start: int, seed: int) -> None:
    def made(first: int, count: int) -> list[dict[str, np.ndarray]]:
        return take(make_loader(Numbers(size), stack, batch_size=batch, seed=seed, start_step=first), count)

    assert_same(made(0, start + 3)[start:], made(start, 3))


def test_a_loader_stopped_and_resumed_at_random_steps_gives_the_uninterrupted_batches() -> None:
    """Each part is another loader, with its own prefetched batches that are thrown away."""
    rng = np.random.default_rng(3)
    expected = take(make_loader(Numbers(23), stack, batch_size=4, seed=9), 30)
    got: list[dict[str, np.ndarray]] = []
    while len(got) < len(expected):
        count = min(int(rng.integers(0, 7)), len(expected) - len(got))
        got += take(make_loader(Numbers(23), stack, batch_size=4, seed=9, start_step=len(got)), count)
    assert_same(expected, got)


KILLED = """
import sys
from tests.data.test_loader import Numbers, make_loader, stack
start, workers = map(int, sys.argv[1:])
with make_loader(Numbers(23), stack, batch_size=4, seed=9, start_step=start, workers=workers) as loader:
    for batch in loader:
        print(batch["row"][:, :2].tolist(), *set(batch["process"].tolist()), flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_resumes_from_the_number_of_steps_it_finished() -> None:
    """SIGKILL at random moments, with and without workers, which must not stay behind."""
    rng = np.random.default_rng(4)
    lines: list[str] = []
    makers: set[int] = set()
    for workers in (0, 1, 2, 0):
        command = [sys.executable, "-c", KILLED, str(len(lines)), str(workers)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(int(rng.integers(4, 12))):
                line, maker = process.stdout.readline().rsplit(maxsplit=1)
                lines.append(line)
                makers.add(int(maker))
            process.kill()
    assert len(makers) > 4
    wait_for_end(makers)
    expected = take(make_loader(Numbers(23), stack, batch_size=4, seed=9), len(lines))
    assert [json.loads(line) for line in lines] == [batch["row"][:, :2].tolist() for batch in expected]


def wait_for_end(processes: set[int]) -> None:
    deadline = time.monotonic() + 20
    while alive := {process for process in processes if Path(f"/proc/{process}").exists()}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@pytest.mark.parametrize("hosts", [2, 3])
def test_an_epoch_over_all_hosts_is_disjoint_and_complete(hosts: int) -> None:
    size = 12 * hosts
    parts = [
        rows(take(make_loader(Numbers(size), stack, batch_size=hosts * 4, seed=3, shard_index=i, shard_count=hosts), 3))
        for i in range(hosts)
    ]
    assert sorted(row for part in parts for row, _ in part) == list(range(size))


@pytest.mark.parametrize(("steps", "workers"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)])
def test_short_loaders_end(steps: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one without shared memory, as in a container that has too little of it."""
    monkeypatch.setattr("fusevla.data.loader._has_shared_memory", lambda: False)
    with make_loader(Numbers(6), stack, batch_size=2, seed=0, steps=steps, workers=workers) as loader:
        assert len(list(loader)) == steps


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 40), hosts=st.sampled_from([1, 2, 4]), local=st.integers(1, 3), start=st.integers(0, 30))
def test_hosts_share_each_batch(size: int, hosts: int, local: int, start: int) -> None:
    batch = hosts * local
    whole = take(make_loader(Numbers(size), stack, batch_size=batch, seed=1, start_step=start), 4)
    parts = [
        take(make_loader(Numbers(size), stack, batch_size=batch, seed=1, start_step=start, shard_index=i, shard_count=hosts), 4)
        for i in range(hosts)
    ]
    for step in range(4):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in ("row", "noise")}
        assert_same([whole[step]], [joined])


@given(st.integers(1, 300), st.integers(0, 1000), st.integers(0, 2**40))
def test_global_order_is_a_permutation_of_each_epoch(size: int, seed: int, epoch: int) -> None:
    visited = [global_order(epoch * size + i, size, seed) for i in range(size)]
    assert sorted(row for row, _ in visited) == list(range(size))
    assert {e for _, e in visited} == {epoch}


def test_in_order_and_finite() -> None:
    batches = list(make_loader(Numbers(6), stack, batch_size=2, seed=0, shuffle=False, steps=4))
    assert rows(batches) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (0, 1), (1, 1)]


def test_a_run_far_into_its_training_starts_at_once() -> None:
    far = take(make_loader(Numbers(678_000), stack, batch_size=256, seed=0, start_step=3_000_000), 1)
    assert far[0]["row"][0, 1] == 3_000_000 * 256 // 678_000


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_source_raises_comes_out(workers: int) -> None:
    with (
        make_loader(Numbers(4, bad=2), stack, batch_size=4, seed=0, workers=workers) as loader,
        pytest.raises(Exception, match="row 2 is damaged"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": Numbers(0)}, "empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "shard_count": 2}, "multiple of the number of hosts"),
        ({"shard_index": 1}, "shard_index"),
        ({"start_step": -1}, "start_step"),
        ({"workers": -1}, "workers"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    arguments = {"source": Numbers(4), "collate": stack, "batch_size": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        make_loader(**arguments)


def test_closing_twice_is_fine() -> None:
    loader = make_loader(Numbers(4), stack, batch_size=2, seed=0)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


def test_loading_does_not_import_torch() -> None:
    code = """
import sys
from tests.data.test_loader import Numbers, make_loader, stack
next(make_loader(Numbers(4), stack, batch_size=2, seed=0))
assert not {"torch", "tensorflow", "lerobot"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_closed_loader_leaves_quietly() -> None:
    code = """
from tests.data.test_loader import Numbers, make_loader, stack
with make_loader(Numbers(4), stack, batch_size=2, seed=0) as loader:
    next(loader)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_workers_change_nothing_of_real_batches(libero_sample: Path) -> None:
    """Decoded images, thoughts, tokens and actions, in batches that are made and shared by processes."""
    annotations, frames = load_annotations(libero_sample / "cot_simple.json"), open_set(libero_sample)
    tokenizer = make_tokenizer("train", set_texts(frames, annotations), LIBERO10.model)
    model = with_vocabulary(LIBERO10, tokenizer.vocab_size).model
    source = SampleSource(frames, annotations, tokenizer, compute_norm_stats(frames), LIBERO10.data, model)

    def leaves(workers: int) -> list[np.ndarray]:
        options: dict[str, Any] = {"batch_size": 8, "seed": 2, "start_step": 195, "workers": workers}
        with make_loader(source, lambda samples: collate(samples, LIBERO10.data.text_buckets), **options) as loader:
            return [np.array(leaf) for batch in itertools.islice(loader, 12) for leaf in jax.tree.leaves(batch)]

    expected = leaves(0)
    for workers in (1, 2, 4):
        for left, right in zip(expected, leaves(workers), strict=True):
            np.testing.assert_array_equal(left, right)
