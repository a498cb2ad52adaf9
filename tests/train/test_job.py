"""Assembling a run: a real set becomes samples, base weights become trainable and frozen leaves, and both come back."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from fusevla.data.lerobot import open_set
from fusevla.data.normalize import compute_norm_stats, stats_to_json
from fusevla.model.openpi import save_params
from fusevla.policy.load import load_policy
from fusevla.presets import LIBERO10, TINY, DataConfig, Preset
from fusevla.train import job
from fusevla.train.checkpoint import CheckpointError, Checkpoints, save_frozen
from fusevla.train.material import Material, choose_buckets, prepare
from fusevla.train.optim import make_optimizer
from fusevla.train.sharding import make_mesh
from fusevla.train.state import init_state
from tests.train.synthetic import MODEL, TRAIN, small_model

MESH = make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def preset(libero_sample: Path) -> Preset:
    return dataclasses.replace(LIBERO10, model=TINY, data=DataConfig(data=str(libero_sample)))


@pytest.fixture(scope="module")
def material(preset: Preset) -> Material:
    return prepare(preset, "train")


def test_vocabulary_and_buckets_follow_the_set(material: Material) -> None:
    (training,), (held_out,) = material.training, material.held_out
    assert material.preset.model.vocab_size == material.tokenizer.vocab_size <= TINY.vocab_size
    assert material.preset.data.text_buckets == (128, 415)
    assert material.lengths == [128]
    assert max(training.report.longest.values()) <= 128
    assert training.max_len == held_out.max_len == 415


def test_statistics_are_of_the_training_episodes(material: Material, libero_sample: Path) -> None:
    frames = open_set(libero_sample)
    (training,), (held_out,) = material.training, material.held_out
    expected = compute_norm_stats(frames, training.episodes)
    assert material.stats is not None
    assert stats_to_json(material.stats) == stats_to_json(expected)
    assert not set(training.episodes) & set(held_out.episodes)


def test_no_normalisation_keeps_raw_values(preset: Preset) -> None:
    raw = prepare(dataclasses.replace(preset, data=dataclasses.replace(preset.data, norm="none")), "train")
    assert raw.stats is None
    (training,) = raw.training
    actions = training.frames.actions
    np.testing.assert_array_equal(training(0, 0, 0).actions[0, : actions.shape[1]], actions[training.rows[0]])


def test_a_resumed_run_sees_the_same_samples(material: Material) -> None:
    base = job.base_of(small_model(), None)
    again = prepare(material.preset, "ignored", job.run_info(material, base, {}))
    assert again.preset == material.preset
    assert again.lengths == material.lengths
    assert again.held_out[0].max_len == 415
    for index in (0, 700, 1400):
        first, second = material.samples(index, 3, 42), again.samples(index, 3, 42)
        np.testing.assert_array_equal(first.text.tokens, second.text.tokens)
        np.testing.assert_array_equal(first.actions, second.actions)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "params"
    save_params(folder, small_model())
    return folder


def assert_equal(got: object, expected: object) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("stored", [True, False])
def test_a_policy_comes_back_from_checkpoints_alone(
    weights: Path, tmp_path: Path, material: Material, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "STORE_BELOW", 2**20 if stored else 0)
    preset = Preset("small", MODEL, train=TRAIN)
    trainable, frozen = job.make_model(preset, str(weights), MESH)
    base = job.base_of(frozen, str(weights))
    assert base.stored == stored
    info = dataclasses.replace(job.run_info(material, base, {}), preset=preset)
    if stored:
        save_frozen(tmp_path, frozen)
    writer = Checkpoints(tmp_path, 1, info)
    writer.save(3, init_state(trainable, make_optimizer(TRAIN), jax.random.key(0)))
    writer.close()
    model, restored = load_policy(tmp_path)
    assert_equal(model, job.combine(trainable, frozen))
    assert (restored.tokenizer, restored.norm_stats) == (info.tokenizer, info.norm_stats)


def test_other_base_weights_are_refused(weights: Path, tmp_path: Path, material: Material) -> None:
    preset = Preset("small", MODEL, train=TRAIN)
    _, frozen = job.make_model(preset, str(weights), MESH)
    other = tmp_path / "other" / "params"
    save_params(other, small_model(seed=1))
    base = dataclasses.replace(job.base_of(frozen, str(weights)), path=str(other), stored=False)
    info = dataclasses.replace(job.run_info(material, base, {}), preset=preset)
    with pytest.raises(CheckpointError, match="expected the frozen leaves this run began with"):
        job.restore_frozen(tmp_path, info, MESH)


def test_small_buckets_are_used_where_batches_are_short(preset: Preset, material: Material) -> None:
    data = dataclasses.replace(material.preset.data, text_buckets=(40, 64, 96, 110, 128, 415))
    resized = dataclasses.replace(material.preset, data=data)
    source = prepare(
        resized, "", job.run_info(dataclasses.replace(material, preset=resized), job.base_of(small_model(), None), {})
    )
    alone, many = (choose_buckets(source.training, (), batch_size) for batch_size in (1, 64))
    assert {64, 110, 415} <= set(alone)
    assert 64 not in many
    assert max(source.training[0].report.longest.values()) <= 110
