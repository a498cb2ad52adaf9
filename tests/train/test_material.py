"""Several sets as one: pooled statistics, shares by weight, held-out episodes of each, the same again on resume."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fusevla.data.lerobot import open_set
from fusevla.data.mixture import Mixture
from fusevla.data.normalize import compute_norm_stats, pooled_norm_stats
from fusevla.data.toy import write_toy_set
from fusevla.evaluate.metrics import pick_held_out, training_mean
from fusevla.presets import TOY, DataConfig, Preset
from fusevla.train import job
from fusevla.train.material import Material, prepare
from fusevla.train.request import TOY_BASE
from tests.data import lerobot_sets
from tests.train.synthetic import small_model

TOKENIZER = str(TOY_BASE / "tokenizer.model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    return write_toy_set(root / "a", count=5, looks=3, seed=1), write_toy_set(root / "b", count=3, looks=2, seed=2)


def both(folders: tuple[Path, Path], **changes: object) -> Preset:
    data = dataclasses.replace(TOY.data, data=str(folders[0]), more_data=(str(folders[1]),), held_out_fraction=0.3)
    return dataclasses.replace(TOY, data=dataclasses.replace(data, **changes))


@pytest.fixture(scope="module")
def material(folders: tuple[Path, Path]) -> Material:
    return prepare(both(folders, data_weights=(1.0, 3.0)), TOKENIZER)


def test_samples_come_from_each_set_by_its_weight(material: Material) -> None:
    samples = material.samples
    assert isinstance(samples, Mixture)
    assert len(samples) == sum(map(len, material.training))
    assert samples.slots[1] == pytest.approx(3 * samples.slots[0], abs=4)
    for index in (0, len(samples) - 1):
        which, row, epoch = samples.locate(index, 0, 7)
        source = material.training[which]
        drawn = samples(index, 0, 7)
        position, frame = source.frames.locate(int(source.rows[row]))
        assert (drawn.episode, drawn.frame) == (source.frames.episodes[position].index, frame)
        assert epoch >= 0


def test_statistics_are_of_all_training_episodes_together(material: Material, folders: tuple[Path, Path]) -> None:
    """Each set has a norm_stats.json of its own; neither is right for both."""
    rows = [source.frames.actions[source.rows] for source in material.training]
    together = np.concatenate(rows)
    assert material.stats is not None
    pooled = material.stats["actions"]
    assert pooled.q99 is not None
    np.testing.assert_allclose(pooled.mean, together.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pooled.q99, np.quantile(together.astype(float), 0.99, axis=0))
    alone = compute_norm_stats(open_set(folders[0]))
    assert not np.array_equal(alone["actions"].mean, pooled.mean)


def test_every_set_keeps_held_out_episodes(material: Material) -> None:
    assert len(material.held_out) == 2
    for train, kept in zip(material.training, material.held_out, strict=True):
        assert train.frames is kept.frames
        assert not set(train.episodes) & set(kept.episodes)
    few = pick_held_out(material.held_out, 4)
    assert (len(few.reason), len(few.act)) == (4, 4)
    tables = {sample.images["base_0_rgb"].tobytes() for sample in few.samples if sample.images["base_0_rgb"] is not None}
    assert len(tables) > 2


def test_the_mean_action_is_of_both(material: Material) -> None:
    one, other = (training_mean([source]) for source in material.training)
    counts = [len(source.acting_rows) for source in material.training]
    expected = (one * counts[0] + other * counts[1]) / sum(counts)
    np.testing.assert_allclose(training_mean(material.training), expected, rtol=1e-4, atol=1e-6)


def test_resuming_gives_the_same_samples(material: Material) -> None:
    info = job.run_info(material, job.base_of(small_model(), None), {})
    again = prepare(material.preset, "ignored", info)
    assert again.preset == material.preset
    for index in (0, 31, len(material.samples) - 1):
        first, second = material.samples(index, 2, 42), again.samples(index, 2, 42)
        np.testing.assert_array_equal(first.text.tokens, second.text.tokens)
        np.testing.assert_array_equal(first.actions, second.actions)
        np.testing.assert_array_equal(first.images["base_0_rgb"], second.images["base_0_rgb"])


def test_the_annotations_given_belong_to_the_first_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = both(folders, annotations=str(tmp_path / "cot.json")).data
    assert data.sets == ((str(folders[0]), str(tmp_path / "cot.json")), (str(folders[1]), str(folders[1] / "cot_simple.json")))
    assert DataConfig().sets == ()


def test_sets_of_other_dimensions_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = open_set(lerobot_sets.write(tmp_path / "other"))
    toy = open_set(folders[0])
    with pytest.raises(ValueError, match=r"state: expected the same number of dimensions in every set, got 3 in"):
        pooled_norm_stats([(toy, (0,)), (other, (0,))])
