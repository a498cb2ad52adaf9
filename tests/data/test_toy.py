"""The expert, its demonstrations, and the sets made of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.data.annotations import act_only_prefix, check_annotations, choose_thought, load_annotations
from fusevla.data.lerobot import open_set
from fusevla.data.normalize import load_norm_stats, normalize
from fusevla.data.prompts import initial_content
from fusevla.data.toy import (
    LOOK_FRAMES,
    RELATIONS,
    annotation,
    base_episode,
    episodes,
    expert,
    frames,
    look_episode,
    norm_stats,
    plan_episode,
    plan_world,
    subgoal,
    succeeded,
    write_toy_set,
)
from fusevla.data.toy_text import toy_tokenizer
from fusevla.data.toy_world import COLORS, state, step

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_plan_episodes_succeed_and_stay_short(seed):
    episode = plan_episode(np.random.default_rng(seed))
    assert succeeded(episode.worlds[-1], episode.plan)
    assert len(episode.worlds) == len(episode.actions) <= 60
    assert episode.placed_at[-1] == len(episode) - 1


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_the_plan_follows_from_image_and_instruction(seed):
    """Both named blocks, in the order that the relation and the blocks' places give; nothing else tells the order."""
    task, world, plan = plan_world(np.random.default_rng(seed))
    words = task.split()
    assert {world.colors[i] for i in plan} == {word for word in words if word in COLORS}
    phrase = task.partition(" in the tray")[2]
    direction = next(d for p, d, _ in RELATIONS.values() if p == phrase)
    first, second = (world.blocks[i] @ direction for i in plan)
    assert second - first > 0.5


def test_instructions_do_not_reveal_the_order():
    """Over many episodes the block named first is as often second in the plan."""
    named_first = 0
    for seed in range(300):
        task, world, plan = plan_world(np.random.default_rng(seed))
        named_first += next(word for word in task.split() if word in COLORS) == world.colors[plan[0]]
    assert 120 < named_first < 180


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_base_episodes_name_one_block_and_place_it(seed):
    episode = base_episode(np.random.default_rng(seed))
    (target,) = episode.plan
    assert target in episode.worlds[-1].placed
    assert subgoal(episode.worlds[0].colors[target]) in episode.task
    assert "then" not in episode.task
    assert "Plan" not in episode.task


def test_expert_without_noise_is_straight_and_fast():
    _, world, plan = plan_world(np.random.default_rng(3))
    steps = 0
    for target in plan:
        while target not in world.placed:
            world = step(world, expert(world, target))
            steps += 1
    assert steps < 45
    assert np.array_equal(expert(world, plan[-1]), [0, 0, -1])


def test_expert_puts_down_a_wrong_block():
    _, world, plan = plan_world(np.random.default_rng(4))
    while world.held is None:
        world = step(world, expert(world, plan[1]))
    for _ in range(60):
        world = step(world, expert(world, plan[0]))
    assert world.placed == (plan[0],)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_in_a_look_the_gripper_moves_and_nothing_else_does(seed):
    episode = look_episode(np.random.default_rng(seed))
    assert len(episode.worlds) == len(episode.actions) == LOOK_FRAMES
    for before, action, after in zip(episode.worlds, episode.actions, episode.worlds[1:], strict=False):
        np.testing.assert_array_equal(before.blocks, after.blocks)
        np.testing.assert_allclose(state(step(before, action)), state(after), atol=1e-5)
        assert (after.held, after.placed) == (None, ())
    (segment,) = annotation(episode)["segments"]
    first, second = (subgoal(episode.worlds[0].colors[i]) for i in episode.plan)
    assert segment["content"] == initial_content(episode.task)
    assert segment["updated_content"].startswith(f"Plan: 1. {first}\n2. {second}\n What I have done: Nothing.")


def test_segments_cover_the_episode_and_change_where_the_image_does():
    episode = plan_episode(np.random.default_rng(0))
    segments = annotation(episode)["segments"]
    assert [s["updated_content"] is not None for s in segments] == [True, False, True, False, True]
    assert [s["end_step"] for s in segments[:-1]] == [s["start_step"] for s in segments[1:]]
    assert segments[0]["start_step"] == 0
    assert segments[-1]["end_step"] == -1
    assert segments[-1]["start_step"] == len(episode) - 1
    for segment in segments[2::2]:
        before, after = (episode.worlds[segment["start_step"] + d] for d in (-1, 0))
        assert len(after.placed) == len(before.placed) + 1


def test_thoughts_say_what_is_done():
    episode = plan_episode(np.random.default_rng(1))
    names = [subgoal(episode.worlds[0].colors[i]) for i in episode.plan]
    updates = [s["updated_content"] for s in annotation(episode)["segments"] if s["updated_content"]]
    plan = f"Plan: 1. {names[0]}\n2. {names[1]}\n"
    assert updates == [
        plan + f" What I have done: Nothing.\nNow I need to do: {names[0]}\n",
        plan + f" What I have done: 1. {names[0]}\nNow I need to do: {names[1]}\n",
        plan + f" What I have done: 1. {names[0]}\n2. {names[1]}\nNow I need to do: Nothing. Task complete.\n",
    ]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return write_toy_set(tmp_path_factory.mktemp("toy") / "plans", "plans", count=4, looks=2, seed=5)


def test_written_set_reads_back(plans):
    data = open_set(plans)
    assert (data.version, data.fps, len(data.episodes)) == ("v2.1", 10, 6)
    for index, episode in enumerate([*episodes("plans", 4, 5), *episodes("looks", 2, 5)]):
        stored = frames(episode)
        rows = data.episode_slice(index)
        assert data.episodes[index].task == episode.task
        np.testing.assert_array_equal(data.state[rows], stored.state)
        np.testing.assert_array_equal(data.actions[rows], episode.actions)
        np.testing.assert_array_equal(data.image("base_0_rgb", rows.stop - 1), stored.images["image"][-1])
        np.testing.assert_array_equal(data.image("left_wrist_0_rgb", rows.stop - 1), stored.images["wrist_image"][-1])


def test_written_annotations_pass_every_check(plans):
    annotations = load_annotations(plans / "cot_simple.json")
    lengths = {e.index: e.length for e in open_set(plans).episodes}
    check_annotations(annotations, lengths)
    assert annotations.vision_language == {4, 5}
    for index, episode in annotations.episodes.items():
        looks = index in annotations.vision_language
        for frame in range(lengths[index]):
            thought = choose_thought(episode, frame, lengths[index], 0.0, 0.0, vision_language=looks)
            assert thought.prefix.startswith("Instruction: put the")
            assert thought.actions is False or not looks


def test_base_set_has_no_plans(tmp_path):
    root = write_toy_set(tmp_path / "base", "base", count=2)
    assert not (root / "cot_simple.json").exists()
    assert act_only_prefix(open_set(root).episodes[0].task).count("TBD") == 3


def test_a_set_is_never_overwritten(plans):
    with pytest.raises(FileExistsError):
        write_toy_set(plans)


def test_episode_does_not_depend_on_the_count():
    assert [e.task for e in episodes("plans", 3, 7)] == [e.task for e in episodes("plans", 5, 7)][:3]


def test_statistics_map_the_world_into_the_unit_cube(plans):
    stats = load_norm_stats(plans)
    data = open_set(plans)
    assert np.abs(normalize(data.state, stats["state"])).max() <= 1 + 1e-5
    assert np.abs(normalize(data.actions, stats["actions"])).max() <= 1 + 1e-5
    np.testing.assert_array_equal(stats["actions"].q99, norm_stats()["actions"].q99)
    assert normalize(state(plan_world(np.random.default_rng(0))[1]), stats["state"]).shape == (3,)


def test_tokenizer_has_a_piece_per_colour_and_loses_nothing(plans):
    tokenizer = toy_tokenizer()
    for color in COLORS:
        assert len(tokenizer.encode(f" {color}")) == 1
    for episode in load_annotations(plans / "cot_simple.json").episodes.values():
        for segment in episode.segments:
            assert tokenizer.decode(tokenizer.encode(segment.content)) == segment.content
            assert len(tokenizer.encode(segment.content)) < 48
    assert toy_tokenizer() == tokenizer
