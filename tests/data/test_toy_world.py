"""Physics and drawing of the tabletop."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.data.toy_world import COLORS, IMAGE_SIZE, MAX_STEP, OPENING, TABLE, World, draw, over_tray, random_world, state, step

OPEN, CLOSE = -1.0, 1.0


def make(**changes) -> World:
    """A red block at (1.5, 1.5), a blue one at (3.5, 3.5), the tray at (3.5, 0.5), an open gripper above the red block."""
    world = World(
        gripper=np.array([1.5, 1.5]),
        opening=1.0,
        tray=np.array([3.5, 0.5]),
        colors=("red", "blue"),
        blocks=np.array([[1.5, 1.5], [3.5, 3.5]]),
    )
    return dataclasses.replace(world, **changes)


def act(world: World, *actions: tuple[float, float, float]) -> World:
    for action in actions:
        world = step(world, np.array(action))
    return world


def test_closing_grasps_and_the_block_follows():
    held = act(make(), (0, 0, CLOSE), (0.5, 0, CLOSE))
    assert held.held == 0
    assert held.opening == 0
    np.testing.assert_allclose(held.blocks[0], [2.0, 1.5])
    np.testing.assert_allclose(held.blocks[1], [3.5, 3.5])


@pytest.mark.parametrize("changes", [{"gripper": np.array([2.5, 2.5])}, {"opening": 0.4}], ids=["too far", "not open enough"])
def test_closing_on_nothing(changes):
    world = act(make(**changes), (0, 0, CLOSE))
    assert world.held is None
    assert world.opening == 0


def test_release_over_the_tray_places_and_elsewhere_drops():
    held = act(make(), (0, 0, CLOSE))
    placed = step(dataclasses.replace(held, gripper=held.tray), np.array([0, 0, OPEN]))
    assert placed.placed == (0,)
    assert placed.held is None
    assert placed.opening == pytest.approx(OPENING)
    dropped = act(held, (0.5, 0, CLOSE), (0, 0, OPEN))
    assert dropped.placed == ()
    assert dropped.held is None
    np.testing.assert_allclose(dropped.blocks[0], [2.0, 1.5])


def test_blocks_in_the_tray_stay_there():
    world = make(placed=(0,), blocks=np.array([[3.25, 0.25], [3.5, 3.5]]), gripper=np.array([3.25, 0.25]))
    assert act(world, (0, 0, CLOSE)).held is None


def test_opening_is_slow_and_ends_at_one():
    world = make(opening=0.0)
    seen = []
    for _ in range(6):
        world = act(world, (0, 0, OPEN))
        seen.append(world.opening)
    np.testing.assert_allclose(seen, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert seen[4] == 1.0


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_invariants(seed):
    rng = np.random.default_rng(seed)
    world = random_world(rng, num_blocks=int(rng.integers(1, 7)))
    for _ in range(40):
        before = world
        world = step(world, rng.normal(0, 1, 3))
        assert np.linalg.norm(world.gripper - before.gripper) <= MAX_STEP + 1e-9
        assert ((world.gripper >= 0) & (world.gripper <= TABLE)).all()
        assert 0 <= world.opening <= 1
        assert world.placed[: len(before.placed)] == before.placed
        assert len(set(world.placed)) == len(world.placed)
        if world.held is not None:
            assert world.held not in world.placed
            np.testing.assert_array_equal(world.blocks[world.held], world.gripper)
        others = [i for i in range(len(world.colors)) if i not in (before.held, world.held)]
        np.testing.assert_array_equal(world.blocks[others], before.blocks[others])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_things_start_in_cells_of_their_own(seed):
    world = random_world(np.random.default_rng(seed), num_blocks=6)
    cells = {tuple(np.floor(place).astype(int)) for place in (*world.blocks, world.tray)}
    assert len(cells) == 7
    assert len(set(world.colors)) == 6
    assert not over_tray(dataclasses.replace(world, gripper=world.blocks[0]))


def test_a_step_changes_nothing_in_place():
    world = make()
    copies = (world.gripper.copy(), world.blocks.copy())
    act(world, (0.3, 0.3, CLOSE), (0.3, 0.3, CLOSE))
    np.testing.assert_array_equal(world.gripper, copies[0])
    np.testing.assert_array_equal(world.blocks, copies[1])


def test_state_is_position_and_opening():
    assert state(make()).dtype == np.float32
    np.testing.assert_allclose(state(make()), [1.5, 1.5, 1.0])


def test_cameras_show_what_is_where():
    images = draw(make(gripper=np.array([4.5, 4.5])))
    assert {name: (image.shape, image.dtype) for name, image in images.items()} == {
        name: ((IMAGE_SIZE, IMAGE_SIZE, 3), np.dtype(np.uint8)) for name in ("base_0_rgb", "left_wrist_0_rgb")
    }
    base, wrist = images["base_0_rgb"], images["left_wrist_0_rgb"]
    per_cell = IMAGE_SIZE // TABLE
    assert tuple(base[int(1.5 * per_cell), int(1.5 * per_cell)]) == COLORS["red"]
    assert tuple(base[per_cell // 2, int(3.5 * per_cell)]) == (255, 255, 255)
    assert tuple(base[per_cell // 2, per_cell // 2]) == (70, 70, 70)
    assert tuple(wrist[0, 0]) == (0, 0, 0)
    # the blue block is one cell up and left of the gripper, which is the wrist camera's centre
    middle, cell = IMAGE_SIZE // 2, IMAGE_SIZE // 8
    assert tuple(wrist[middle - cell, middle - cell]) == COLORS["blue"]


def test_drawing_is_smooth():
    """A small move changes the image a little: sub-pixel positions are visible."""
    near = draw(make(gripper=np.array([4.0, 4.0])))["left_wrist_0_rgb"].astype(int)
    moved = draw(make(gripper=np.array([4.02, 4.0])))["left_wrist_0_rgb"].astype(int)
    assert 0 < np.abs(near - moved).max() < 64


def test_opening_and_holding_can_be_seen():
    closed, opened = draw(make(opening=0.0)), draw(make(opening=1.0))
    held = draw(act(make(gripper=np.array([1.4, 1.5])), (0, 0, CLOSE)))
    assert (closed["base_0_rgb"] != opened["base_0_rgb"]).any()
    assert (held["left_wrist_0_rgb"] != closed["left_wrist_0_rgb"]).any()
