"""LIBERO in closed loop: what judges are told about an episode, without a simulator; where there is one, whole evaluations."""

import contextlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusevla.evaluate import closed_loop, libero_rollout
from fusevla.evaluate.closed_loop import libero_job, open_journal, play_all
from fusevla.evaluate.libero import LiberoEnv, Task
from fusevla.evaluate.libero_plan import PickAndPlace, pick_and_place, spoken
from fusevla.evaluate.libero_rollout import EXECUTED, LiberoArena, Simulation
from fusevla.evaluate.outcome import Ticket
from fusevla.policy.policy import Query, Reply

BDDL = "(define (problem X) (:goal\n (And (In alphabet_soup_1 basket_1_contain_region))\n )\n)"
SAID = "pick up the alphabet soup and place it in the basket"
PLANS = ("pick up the alphabet soup", "place the alphabet soup in the basket")


def task(folder: Path, language: str = SAID, bddl: str = BDDL) -> Task:
    (folder / "task.bddl").write_text(bddl)
    return Task("libero_object", 0, language, folder / "task.bddl", folder / "task.pruned_init")


def test_a_task_in_two_sub_goals(tmp_path: Path) -> None:
    found = pick_and_place(task(tmp_path))
    assert found == PickAndPlace("alphabet_soup_1", "in", "basket_1_contain_region", "alphabet soup", PLANS)
    assert spoken("alphabet_soup_1") == "alphabet soup"


def test_which_of_two_is_part_of_the_first_sub_goal_only(tmp_path: Path) -> None:
    said = "pick up the black bowl next to the plate and place it on the plate"
    found = pick_and_place(task(tmp_path, said, "(:goal (And (On akita_black_bowl_1 plate_1)))"))
    assert found is not None
    assert found.plans == ("pick up the black bowl next to the plate", "place the black bowl on the plate")
    assert (found.noun, found.target) == ("black bowl", "plate_1")


@pytest.mark.parametrize(
    ("said", "bddl"),
    [("turn on the stove", BDDL), (SAID, "(:goal (And (In a_1 b_1) (In c_1 b_1)))"), (SAID, "(:goal (Open a_1))")],
)
def test_other_tasks_have_none(tmp_path: Path, said: str, bddl: str) -> None:
    assert pick_and_place(task(tmp_path, said, bddl)) is None


class FakeEnv(LiberoEnv):
    """Grasps the ketchup at its second step and the soup at its fourth; done at the sixth."""

    def __init__(self, task: Task, *, cameras: bool = True, assets: Path | None = None) -> None:
        self.task, self.looks = task, list[bool]()

    def reset(self, init: int, seed: int = 7) -> dict[str, np.ndarray]:
        self.steps, self.success = 0, False
        self.observation = self._view()
        return self.observation

    def _view(self) -> dict[str, np.ndarray]:
        image = np.full((4, 4, 3), self.steps, np.uint8)
        return {"base_0_rgb": image, "left_wrist_0_rgb": image, "state": np.zeros(8, np.float32)}

    @property
    def held(self) -> str | None:
        return {2: "ketchup_1", 4: "alphabet_soup_1", 5: "alphabet_soup_1"}.get(self.steps)

    def poses(self) -> dict[str, Any]:
        nowhere = np.zeros(3), np.zeros(4)
        return dict.fromkeys(["alphabet_soup_1", "ketchup_1", "basket_1_contain_region"], nowhere)

    def step(self, action: np.ndarray, *, look: bool = True) -> bool:
        self.steps += 1
        self.looks.append(look)
        self.success = self.steps == 6
        self.observation = self._view()
        return self.success

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    monkeypatch.setattr(libero_rollout, "LiberoEnv", FakeEnv)
    monkeypatch.setattr(libero_rollout, "tasks", lambda suite: [task(tmp_path)])
    return Simulation("object")


def test_judges_are_told_what_is_held_and_how_far_it_is(simulation: Simulation) -> None:
    first = simulation.start(Ticket((0, 0, 3)))
    assert (first.task, first.plans, first.placed) == (SAID, PLANS, 0)
    assert first.names == ("alphabet soup", "ketchup")
    seen = [simulation.move(np.zeros((2, 7))) for _ in range(3)]
    assert [s.taken for s in seen] == [("ketchup",), ("alphabet soup",), ()]
    assert [(s.placed, s.over, s.success, s.steps) for s in seen] == [
        (0, False, False, 2),
        (1, False, False, 4),
        (2, True, True, 6),
    ]
    assert isinstance(simulation._env, FakeEnv)
    assert simulation._env.looks == [False, True] * 3
    assert not any(s.frames for s in seen)


def test_a_film_has_every_step_of_both_cameras_and_ends_with_the_episode(simulation: Simulation) -> None:
    first = simulation.start(Ticket((0, 0, 3), record=True))
    seen = simulation.move(np.zeros((9, 7)))
    assert [frame.shape for frame in first.frames + seen.frames] == [(4, 8, 3)] * 7
    assert seen.steps == 6


def test_a_process_that_ends_is_an_error_that_says_so() -> None:
    arena = LiberoArena("no such suite")
    with contextlib.closing(arena):
        arena.start(Ticket((0, 0, 0)))
        with pytest.raises(RuntimeError, match=r"\(0, 0, 0\) failed in the simulator \(its process ended with exit code 1"):
            arena.seen()
        with pytest.raises(RuntimeError, match="exit code 1"):
            arena.move(np.zeros((1, 7)))


def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(closed_loop, "tasks", lambda suite: [task(tmp_path), task(tmp_path, "turn on the stove")])
    monkeypatch.setattr(closed_loop, "read_init_states", lambda path: np.zeros((10, 4)))
    monkeypatch.setattr(closed_loop, "LiberoEnv", lambda task, assets: types.SimpleNamespace(close=lambda: None))


def test_tickets_go_through_the_tasks_by_initial_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, tmp_path)
    job = libero_job("object", episodes=2, first_init=3, swaps=1, films=1, seed=5)
    plain = [ticket for ticket in job.tickets if ticket.swap is None]
    assert [ticket.key for ticket in plain] == [(5, 0, 3), (5, 1, 3), (5, 0, 4), (5, 1, 4)]
    assert [ticket.record for ticket in plain] == [True, True, False, False]
    assert [(ticket.key, ticket.swap) for ticket in job.tickets[4:]] == [((5, 0, 3), "plan"), ((5, 0, 3), "due")]


@pytest.mark.parametrize(
    ("chosen", "options", "match"),
    [
        ([2], {}, r"tasks from 0 to 1 expected, got \[2\]"),
        ([], {}, "tasks from 0 to 1 expected"),
        (None, {"episodes": 11}, r"task 0 has initial states 0 to 9; asked for 0 to 10"),
        (None, {"episodes": 1, "first_init": 10}, "asked for 10 to 10"),
        (None, {"episodes": 1, "first_init": -1}, "asked for -1 to -1"),
        (None, {"episodes": 1, "swaps": 11}, "asked for 0 to 10"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen, options, match: str) -> None:
    stub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=match):
        libero_job("object", chosen, **options)


class Waits:
    """Thinks once, then holds still."""

    batch_size = 2

    def __call__(self, queries: list[Query]) -> list[Reply]:
        return [self.answer(query) for query in queries]

    def answer(self, query: Query) -> Reply:
        assert query.images["base_0_rgb"] is not None
        assert query.images["base_0_rgb"].shape == (256, 256, 3)
        if query.agent.queries == 0:
            return Reply(query.agent.after_thought("hm", True), thought="hm")
        return Reply(query.agent.after_action(), actions=np.tile([0, 0, 0, 0, 0, 0, -1.0], (16, 1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the simulator's own
def test_an_evaluation_in_the_simulator_is_gone_on_with(
    assets: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = libero_job("object", [0, 1], episodes=1, films=0, assets=assets)
    first = play_all(job, Waits(), open_journal(job, tmp_path / "e", {}))
    assert [(outcome.success, outcome.steps) for outcome in first] == [(False, 280)] * 2
    assert [outcome.malformed for outcome in first] == [1, 1]
    assert first[0].steps % EXECUTED == 0
    monkeypatch.setattr(closed_loop, "play", lambda policy, arenas, tickets, ended: pytest.fail("again") if tickets else None)
    assert play_all(job, Waits(), open_journal(job, tmp_path / "e", {})) == first
