"""Demonstrations of LIBERO: kept and read back, the same set whatever the workers; where the simulator is, filmed for real."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.lerobot_write import EpisodeFrames
from fusevla.data.prompts import parse_thought
from fusevla.evaluate import libero_collect
from fusevla.evaluate.libero import LiberoEnv, Task, tasks
from fusevla.evaluate.libero_collect import Order, Try, collect, successes
from fusevla.evaluate.libero_demos import COLUMNS, REST, Take, annotation, demonstrate, replay
from fusevla.evaluate.libero_plan import PickAndPlace, pick_and_place

TASKS = [Task("libero_object", i, f"pick up the {x} and place it in the basket", Path(), Path()) for i, x in enumerate("ab")]


def take(length: int = 60, seed: int = 0) -> Take:
    rng = np.random.default_rng(seed)
    images = {column: [rng.bytes(int(size)) for size in rng.integers(1, 50, length)] for column in COLUMNS.values()}
    state, actions = (rng.standard_normal((length, width)).astype(np.float32) for width in (8, 7))
    return Take(EpisodeFrames(TASKS[0].language, images, state, actions), 30, length - REST)


def test_a_take_is_read_back_as_it_was(tmp_path: Path) -> None:
    kept = take()
    kept.save(tmp_path / "a.npz")
    found = Take.load(tmp_path / "a.npz")
    assert (found.grasp, found.release, found.frames.task) == (kept.grasp, kept.release, kept.frames.task)
    assert found.frames.images == kept.frames.images
    np.testing.assert_array_equal(found.frames.state, kept.frames.state)
    np.testing.assert_array_equal(found.frames.actions, kept.frames.actions)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_thoughts_follow_what_was_done() -> None:
    plan = PickAndPlace("a_1", "in", "basket_1_contain_region", "a", ("pick up the a", "place the a in the basket"))
    segments = annotation(plan, take())["segments"]
    assert [(s["start_step"], s["end_step"]) for s in segments] == [(0, 12), (12, 30), (30, 39), (39, 54), (54, -1)]
    thoughts = [parse_thought(s["updated_content"]) for s in segments[::2]]
    assert [thought.now for thought in thoughts if thought] == [*plan.plans, None]


class Pool(Executor):
    """Does everything at once, in this process."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[..., Any], /, *args: Any, **_: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work(*args))
        return future


def tries_of(order: Order, fate: list[list[bool]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(task, number, success) of all tries, which succeed as ``fate`` has it, then always."""

    def make(attempt: Try, order: Order) -> bool:
        row = fate[attempt.task.index]
        success = row[attempt.number] if attempt.number < len(row) else True
        if success:
            take(seed=100 * attempt.task.index + attempt.number).save(attempt.path(order.folder))
        else:
            attempt.path(order.folder, success=False).touch()
        return success

    told: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(libero_collect, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(libero_collect, "_make", make)
    collect(order, TASKS, lambda attempt, success: told.append((attempt.task.index, attempt.number, success)))
    return sorted(told)


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=2, max_size=2), st.integers(1, 4), st.integers(1, 4))
def test_tries_are_those_that_one_after_another_would_be(
    tmp_path_factory: pytest.TempPathFactory, fate: list[list[bool]], episodes: int, later: int
) -> None:
    folder = tmp_path_factory.mktemp("tries")
    with pytest.MonkeyPatch.context() as patch:
        for wanted in (episodes, later):  # the second time goes on from the first
            order = Order(wanted, range(3, 5), 0, folder, None, 1)
            expected = []
            for index, row in enumerate(fate):
                good, number = 0, 0
                while good < wanted:
                    success = row[number] if number < len(row) else True
                    expected.append((index, number, success))
                    good, number = good + success, number + 1
            assert tries_of(order, fate, patch) == expected
            numbers = [100 * index + number for index, number, success in expected if success]
            found = list(successes(order, TASKS))
            assert [task.index for task, _ in found] == [index for index in (0, 1) for _ in range(wanted)]
            for (_, kept), number in zip(found, numbers, strict=True):
                np.testing.assert_array_equal(kept.frames.state, take(seed=number).frames.state)


def test_what_never_succeeds_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(2, range(5), 0, tmp_path, None, 1)
    told = tries_of(order, [[False] * 100, []], monkeypatch)
    assert sum(index == 0 for index, *_ in told) == order.most_tries
    assert [success for index, _, success in told if index == 1] == [True, True]


def test_initial_states_take_turns(tmp_path: Path) -> None:
    order = Order(5, range(3, 5), 0, tmp_path, None, 1)
    assert [Try(TASKS[0], number).init(order) for number in range(5)] == [3, 4, 3, 4, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the simulator's own
def test_a_success_is_filmed_as_it_happened(assets: Path | None) -> None:
    task = tasks("object")[0]
    plan = pick_and_place(task)
    assert plan is not None
    with closing(LiberoEnv(task, cameras=False, assets=assets)) as env:
        made = demonstrate(env, plan, 2, np.random.default_rng(0))
        other = demonstrate(env, plan, 2, np.random.default_rng(1))
        assert made is not None
        assert other is not None
        assert made.actions.shape != other.actions.shape or not np.allclose(made.actions, other.actions)
        start = env.reset(2)["state"]
        assert env.held is None
        holding, lifted = list[str | None](), 0.0
        for action in made.executed:
            holding.append(env.held)
            lifted = max(lifted, env.poses()[plan.item][0][2])
            env.step(action, look=False)
        end, basket = env.poses()[plan.item][0], env.poses()[plan.target][0]
    assert {name for name in holding if name} == {plan.item}
    assert all(holding[made.grasp : made.grasp + 20])
    assert not any(holding[made.release :])
    assert lifted > 0.15
    np.testing.assert_allclose(end, basket, atol=0.08)
    noise = made.executed - made.actions
    assert 0 < np.abs(noise[:, :3]).max() < 1
    assert not noise[:, 3:].any()
    with closing(LiberoEnv(task, assets=assets)) as env:
        frames = replay(env, made)
    np.testing.assert_array_equal(frames.state[0], start)
    assert {column: len(views) for column, views in frames.images.items()} == dict.fromkeys(COLUMNS.values(), len(made.actions))
