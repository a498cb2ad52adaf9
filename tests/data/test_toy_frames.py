"""The toy base's training samples: real prompts of its world, and where the things are that they name."""

import numpy as np
import pytest

from fusevla.data.toy_frames import TEXT_LENGTH, Frames
from fusevla.data.toy_text import toy_tokenizer
from fusevla.data.toy_world import COLORS, TABLE, state

TOKENIZER = toy_tokenizer()


@pytest.fixture(scope="module")
def frames() -> Frames:
    return Frames(TOKENIZER, 20, 0)


def test_the_names_are_single_pieces_of_their_own(frames: Frames) -> None:
    assert {color: TOKENIZER.decode([token]).strip() for color, token in frames.names.items()} == {
        color: color for color in COLORS
    }
    assert TOKENIZER.decode([frames.tray]).endswith("in the tray")


def test_every_named_thing_has_its_place_and_nothing_else_has_one(frames: Frames) -> None:
    rows = [(3, 0), (7, 1), (11, 2)]
    frames.rows = rows
    batch, (where, named) = frames.batch(np.random.default_rng(0), 32)
    for row in range(32):
        tokens = np.asarray(batch.observation.tokens[row])
        text = TOKENIZER.decode(tokens)
        index, frame = next((i, t) for i, t in rows if frames.episodes[i].task in text)
        world = frames.episodes[index].worlds[frame]
        mentioned = [color for color in world.colors if f"the {color} block" in text]
        assert named[row].sum() == len(mentioned) + 1, "each block once, and the tray"
        for color in mentioned:
            place = where[row, tokens == frames.names[color]][0]
            centre = world.blocks[world.colors.index(color)]
            np.testing.assert_allclose(2 * place[:2] + state(world)[:2], centre, atol=1e-5)
            np.testing.assert_allclose((place[2:] + 1) * TABLE / 2, centre, atol=1e-5)
        assert not where[row][~named[row]].any()


def test_batches_depend_on_the_generator_alone(frames: Frames) -> None:
    (first, _), (again, _) = (frames.batch(np.random.default_rng(5), 4) for _ in range(2))
    np.testing.assert_array_equal(first.observation.tokens, again.observation.tokens)
    assert first.observation.tokens.shape == (4, TEXT_LENGTH)


def test_a_sample_acts_or_repeats_its_instruction(frames: Frames) -> None:
    batch, _ = frames.batch(np.random.default_rng(1), 64)
    tasks = {episode.task for episode in frames.episodes}
    for row, acts in enumerate(batch.diffusion_loss_mask):
        said = TOKENIZER.decode(np.asarray(batch.observation.tokens[row])[batch.token_loss_mask[row]])
        assert said == "" if acts else said in tasks
    assert 0.05 < 1 - batch.diffusion_loss_mask.mean() < 0.5
