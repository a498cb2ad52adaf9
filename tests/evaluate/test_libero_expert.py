"""The scripted expert against a table that has no physics but fingers, gravity and a hand that lags behind."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevla.evaluate.libero_expert import (
    CLOSE_STEPS,
    Grip,
    Manner,
    Phase,
    Progress,
    Scene,
    act,
    grip_of,
    manner,
)

NOBODY = np.zeros((0, 3))
DOWN = np.array([np.pi, 0.0, 0.0])
OBJECTS = ["alphabet_soup", "bbq_sauce", "butter", "chocolate_pudding", "cream_cheese"]
OBJECTS += ["ketchup", "milk", "orange_juice", "salad_dressing", "tomato_sauce"]


class Table:
    """A hand goes a quarter of the way it is told; fingers hold after five steps, and what is let go falls to the ground."""

    def __init__(self, hand: np.ndarray, item: np.ndarray, target: np.ndarray, grip: np.ndarray) -> None:
        self.hand, self.item, self.target, self.grip = hand.copy(), item.copy(), target.copy(), grip
        self.ground, self.closed, self.held, self.done = item[2], 0, False, False

    def scene(self) -> Scene:
        return Scene(self.hand.copy(), DOWN, self.item.copy(), self.target.copy(), self.held, self.done)

    def step(self, action: np.ndarray) -> None:
        move = 0.26 * 0.05 * action[:3]
        self.hand += move
        self.closed = self.closed + 1 if action[6] > 0 else 0
        near = np.linalg.norm(self.item + self.grip - self.hand) < 0.02
        self.held = self.closed >= 5 and (self.held or bool(near))
        if self.held:
            self.item += move
        else:
            self.item[2] = max(self.ground, self.item[2] - 0.03)
        over = np.linalg.norm(self.item[:2] - self.target[:2]) < 0.04
        self.done = bool(self.done or (over and not self.held and self.item[2] < self.target[2] + 0.05))


places = st.tuples(st.floats(-0.2, 0.2), st.floats(-0.25, 0.25)).map(np.array)


def play(
    table: Table, how: Manner, rng: np.random.Generator | None = None, drop: int = -1
) -> list[tuple[Phase, np.ndarray, Scene]]:
    """Until it is done and let go, or 250 steps; what is held slips away at step ``drop``."""
    progress, steps = Progress(), list[tuple[Phase, np.ndarray, Scene]]()
    while progress.phase is not Phase.RETREAT and len(steps) < 250:
        scene = table.scene()
        progress, action = act(progress, scene, how)
        steps.append((progress.phase, action, scene))
        noise = rng.normal(0.0, 0.15, 3) if rng and progress.phase not in (Phase.CLOSE, Phase.OPEN) else np.zeros(3)
        table.step(action + [*noise, 0, 0, 0, 0])
        if len(steps) == drop:
            table.closed, table.held = -100, False
        if drop >= 0 and action[6] < 0:
            table.closed = 0
    return steps


def start(item: np.ndarray, target: np.ndarray, seed: int, grip: Grip) -> tuple[Table, Manner]:
    hand, thing, place = np.array([-0.15, 0.0, 0.25]), np.array([*item, 0.04]), np.array([*target, 0.067])
    rng = np.random.default_rng(seed)
    how = manner("in", grip, Scene(hand, DOWN, thing, place, False, False), NOBODY, rng)
    return Table(hand, thing, place, how.grip), how


@given(places, places, st.integers(0, 1000))
def test_everything_is_put_away_in_order_and_gently(item: np.ndarray, target: np.ndarray, seed: int) -> None:
    table, how = start(item, target, seed, Grip(0.01))
    steps = play(table, how, np.random.default_rng(seed))
    assert table.done
    phases = [phase for phase, *_ in steps]
    assert list(dict.fromkeys(phases)) == list(Phase)
    assert phases == sorted(phases, key=lambda phase: phase.value)
    for phase, action, scene in steps:
        assert np.isfinite(action).all()
        assert np.abs(action).max() <= 1
        assert (action[6] > 0) == (phase in (Phase.CLOSE, Phase.LIFT, Phase.CARRY, Phase.LOWER))
        aside = np.linalg.norm((scene.hand - scene.item - how.grip)[:2])
        if phase is Phase.DOWN:
            assert aside < 0.04  # never down upon something else
        if phase is Phase.CLOSE:
            assert not action[:3].any()


def test_what_is_dropped_is_picked_up_again() -> None:
    table, how = start(np.array([0.0, -0.2]), np.array([0.0, 0.2]), 0, Grip(0.01))
    undisturbed = play(table, how)
    middle = [phase for phase, *_ in undisturbed].index(Phase.CARRY) + 5
    table, how = start(np.array([0.0, -0.2]), np.array([0.0, 0.2]), 0, Grip(0.01))
    phases = [phase for phase, *_ in play(table, how, drop=middle)]
    assert table.done
    assert phases.count(Phase.CLOSE) > CLOSE_STEPS + 1
    assert Phase.ABOVE in phases[middle:]


def test_empty_fingers_lift_nothing() -> None:
    table, how = start(np.array([0.0, -0.2]), np.array([0.0, 0.2]), 0, Grip(0.01))
    table.grip = np.array([0.0, 0.0, 1.0])  # out of reach
    phases = [phase for phase, *_ in play(table, how)]
    assert not {Phase.LIFT, Phase.CARRY, Phase.LOWER, Phase.OPEN} & set(phases)
    assert phases.count(Phase.ABOVE) > 1


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3), st.booleans())
def test_the_hand_is_turned_upright(parts: list[float], other: bool) -> None:
    axis = np.array([1.0, parts[1], parts[2]]) / np.linalg.norm([1.0, parts[1], parts[2]])
    turned = axis * (np.pi + parts[0])
    if other:  # the same orientation by the other way round
        turned = -axis * (np.pi - parts[0])
    table, how = start(np.zeros(2), np.full(2, 0.2), 0, Grip(0.01))
    _, action = act(Progress(), dataclasses.replace(table.scene(), turned=turned), how)
    np.testing.assert_allclose(rotation(0.5 * action[3:6]) @ rotation(turned), np.diag([1.0, -1.0, -1.0]), atol=1e-6)


def test_a_long_thing_is_taken_where_there_is_room() -> None:
    scene = Scene(np.zeros(3), DOWN, np.array([0.05, -0.1, 0.01]), np.array([0.0, 0.26, 0.067]), False, False)
    takes = {}
    for name, x in (("right", 0.1), ("left", 0.0), ("none", 0.3)):
        others = np.array([[x, -0.2, 0.04]])
        takes[name] = manner("in", Grip(0.004, slack=0.02), scene, others, np.random.default_rng(0)).grip[0]
    assert takes["right"] == pytest.approx(takes["none"] - 0.02)
    assert takes["left"] == pytest.approx(takes["none"] + 0.02)


def test_a_generator_is_a_way_to_do_it() -> None:
    (_, one), (_, same), (_, other) = (start(np.zeros(2), np.full(2, 0.2), seed, Grip(0.01)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(np.concatenate([one.grip, one.place]), np.concatenate([same.grip, same.place]))
    assert one.speed == same.speed != other.speed


def test_what_can_be_gripped_is_known_by_its_kind() -> None:
    assert all(grip_of(f"{name}_1") for name in OBJECTS)
    assert grip_of("akita_black_bowl_2") == grip_of("akita_black_bowl_1")
    assert grip_of("moka_pot_1") is None
