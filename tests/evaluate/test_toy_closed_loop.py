"""The toy world in closed loop: the environment, an expert behind a policy's interface, its figures, pages and films."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from fusevla.data.prompts import parse_thought, plan_thought
from fusevla.data.toy import expert, subgoal
from fusevla.data.toy_world import COLORS
from fusevla.evaluate.closed_loop_report import write_page
from fusevla.evaluate.figures import summarize, swap_figures, wilson
from fusevla.evaluate.film import caption, write_film
from fusevla.evaluate.outcome import Outcome, Swap, Ticket
from fusevla.evaluate.rollout import play, swapped_thought
from fusevla.evaluate.toy_env import MAX_STEPS, ToyEnv
from fusevla.evaluate.toy_rollout import ToyArena, relation_of
from tests.evaluate.toy_expert import Expert

SEEDS = range(40, 46)


def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(ToyEnv(), skip_render_check=True)


def test_an_expert_earns_the_reward_and_a_wrong_block_ends_the_episode() -> None:
    for order, reward in ((1, 1.0), (-1, 0.0)):
        env = ToyEnv()
        _, info = env.reset(seed=3)
        total = 0.0
        for block in env._plan[::order]:
            over = False
            while block not in env._world.placed and not over:
                _, earned, over, truncated, info = env.step(expert(env._world, block))
                total += earned
                assert not truncated
            if over:
                break
        assert (over, total) == (True, reward)
        assert info["placed"] == (2 if reward else 1)


def test_waiting_is_cut_off_and_nonsense_refused() -> None:
    env = ToyEnv()
    env.reset(seed=0)
    ends = [env.step(np.array([0.0, 0.0, -1.0]))[2:4] for _ in range(MAX_STEPS)]
    assert ends == [(False, False)] * (MAX_STEPS - 1) + [(False, True)]
    with pytest.raises(ValueError, match="3 finite numbers expected"):
        env.step(np.array([np.nan, 0.0, 0.0]))


def played(policy: Expert, swap: Swap | None = None, record: int = 0) -> list[Outcome]:
    tickets = [Ticket((seed,), swap, number < record) for number, seed in enumerate(SEEDS)]
    return list(play(policy, [ToyArena() for _ in range(policy.batch_size)], tickets).values())


def comparable(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, frames=[], ticket=Ticket(outcome.ticket.key))


def test_a_perfect_policy_is_perfect_however_many_tables_are_played_at_once() -> None:
    alone = played(Expert(1), record=1)
    together = sorted(played(Expert(4)), key=lambda outcome: outcome.ticket.key)
    assert [comparable(o) for o in alone] == together
    figures = summarize(together)
    assert (figures["success"], figures["thought_accuracy"], figures["thought_exact"], figures["faithfulness"]) == (1, 1, 1, 1)
    assert figures["thoughts"] == 2 * len(SEEDS)
    assert figures["decisions"]["reason due"] == {"reason": 2 * len(SEEDS), "act": 0}
    assert figures["decisions"]["act due"]["reason"] == 0
    assert len(alone[0].frames) == alone[0].steps + 1
    assert not any(outcome.frames for outcome in alone[1:])


def test_true_to_a_wrong_thought_is_faithful_and_fails() -> None:
    figures = summarize(played(Expert(3, wrong=True)))
    assert (figures["success"], figures["thought_accuracy"], figures["faithfulness"]) == (0, 0, 1)
    assert figures["success_interval"][0] == 0


@pytest.mark.parametrize("swap", ["plan", "due"])
def test_an_obedient_policy_takes_the_block_of_the_swapped_thought(swap) -> None:
    found = swap_figures(played(Expert(3), swap=swap))
    assert (found["episodes"], found["obeys_thought"], found["follows_instruction"]) == (len(SEEDS), 1, 0)
    assert swap_figures([])["obeys_thought"] is None


@given(st.permutations(list(COLORS)), st.integers(0, 1), st.integers(0, 99))
def test_a_swapped_thought_is_a_thought_about_another_block_that_is_there(colors, done, seed) -> None:
    plans = [subgoal(color) for color in colors[:2]]
    text, names = plan_thought(plans, done), [f"{color} block" for color in colors[:3]]
    kinds: tuple[Swap, ...] = ("plan", "due")
    for swap in kinds:
        found = swapped_thought(text, names, swap, (seed,))
        assert found is not None
        swapped, other = found
        thought = parse_thought(swapped)
        assert thought is not None
        assert thought.now == subgoal(other.removesuffix(" block")) != plans[done]
        assert other in names
        assert subgoal(other.removesuffix(" block")) not in plans[:done]
        assert thought.done == tuple(plans[:done])
        assert (thought.plans == tuple(plans)) == (swap == "due")


def test_what_cannot_be_swapped_stays() -> None:
    plans = [subgoal("red"), subgoal("blue")]
    assert swapped_thought(plan_thought(plans, 2), ["red block", "blue block"], "plan", (0,)) is None
    assert swapped_thought("no thought", ["red block"], "plan", (0,)) is None
    assert swapped_thought(plan_thought(plans, 0), ["red block"], "plan", (0,)) is None
    assert swapped_thought(plan_thought(plans, 0), ["green block", "grey block"], "plan", (0,)) is None


def test_longer_names_are_not_taken_for_shorter_ones() -> None:
    plans = ["pick up the cream cheese", "place the cream cheese in the basket"]
    swapped = swapped_thought(plan_thought(plans, 0), ["cream", "cream cheese", "cheese"], "plan", (0,))
    assert swapped is None  # both others are in it
    text, other = swapped_thought(plan_thought(plans, 0), ["cream cheese", "ketchup"], "plan", (0,)) or ("", "")
    assert other == "ketchup"
    assert text == plan_thought([plan.replace("cream cheese", "ketchup") for plan in plans], 0)


def test_wilson_intervals() -> None:
    np.testing.assert_allclose(wilson(8, 10), (0.4901625, 0.9433178), atol=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50)[0] == 0.0
    assert wilson(50, 50)[1] == pytest.approx(1.0)


@given(st.integers(1, 500), st.data())
def test_intervals_hold_the_share(trials: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, trials))
    low, high = wilson(count, trials)
    assert 0 <= low <= count / trials + 1e-12
    assert count / trials - 1e-12 <= high <= 1


def test_relations_are_read_from_the_task() -> None:
    assert [relation_of(f"put it in the tray{end}") for end in ("", " from left to right", " from top to bottom")] == [
        "open", "left", "top",
    ]  # fmt: skip


def test_pages_escape_and_name_what_failed(tmp_path: Path) -> None:
    bad = Outcome(Ticket((7,)), task="<script>x</script>", grasps=[("put <b>", None)])
    good = Outcome(Ticket((8,)), task="fine", success=True, film="a.mp4")
    tasks = {"a <b>": {"episodes": 2, "success": 0.5, "success_interval": (0.1, 0.9)}}
    write_page(tmp_path / "r.html", "toy", {"success": 0.5, "n": None, "per_task": tasks}, [bad, good], ["p.png"])
    page = (tmp_path / "r.html").read_text()
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page
    assert "put &lt;b&gt; (none)" in page
    assert "<td>a &lt;b&gt;</td><td>2</td><td>0.500</td><td>0.100 to 0.900</td>" in page
    assert page.count("<video") == page.count("<img") == 1


def test_films_play(tmp_path: Path) -> None:
    frames = [(np.full((60, 120, 3), 40 * i, np.uint8), f"Plan: {i}\n second line") for i in range(5)]
    write_film(tmp_path / "f.mp4", frames, 10)
    with av.open(str(tmp_path / "f.mp4")) as film:
        seen = [frame.to_ndarray(format="rgb24") for frame in film.decode(film.streams.video[0])]
    assert len(seen) == 5
    assert seen[0].shape == caption(*frames[0]).shape
    assert abs(int(seen[4][50, 50, 0]) - 160) < 8
    assert not np.array_equal(caption(frames[0][0], ""), caption(*frames[0]))
