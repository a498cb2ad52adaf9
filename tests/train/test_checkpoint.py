"""Checkpoints: exact round trips, and clear errors for everything that can be wrong with a folder."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusevla.preset_json import preset_from_dict
from fusevla.presets import LIBERO10, PRESETS, LoraConfig, Preset
from fusevla.train import checkpoint as ckpt

INFO = ckpt.RunInfo(
    preset=dataclasses.replace(LIBERO10, name="mine"),
    base=ckpt.BaseWeights(path="/weights", fingerprint="abcd", stored=False),
    tokenizer=b"\x00model bytes\xff",
    norm_stats={"state": {"mean": [0.5], "q01": None}},
    versions={"jax": "0"},
)
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(seed: int = 0) -> dict[str, object]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "trainable": {"a": jax.random.normal(keys[0], (64, 65)), "none": None, "b": jnp.zeros((1, 3))},
        "opt": [jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16), jnp.int32(seed)],
        "step": jnp.int32(7),
    }


def save(directory: Path, steps: tuple[int, ...], keep: int = 9) -> None:
    writer = ckpt.Checkpoints(directory, keep, INFO)
    for step in steps:
        writer.save(step, make_state(step))
    writer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save(directory, (1, 2, 3, 4), keep=2)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def assert_same(got: object, expected: object) -> None:
    assert str(jax.tree.structure(got)) == str(jax.tree.structure(expected))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_round_trip_is_exact_and_takes_the_latest(saved: Path) -> None:
    like = jax.eval_shape(make_state)
    assert_same(ckpt.restore_state(saved, like, SHARDING), make_state(4))
    assert_same(ckpt.restore_state(saved, like, SHARDING, step=3), make_state(3))


def test_info_round_trip(saved: Path) -> None:
    assert ckpt.read_info(saved) == INFO


def test_keeps_the_newest(saved: Path) -> None:
    assert ckpt.complete_steps(saved) == [3, 4]


def test_unfinished_checkpoints_are_ignored(copy: Path) -> None:
    (copy / "9.orbax-checkpoint-tmp-1").mkdir()
    (copy / "8").mkdir()
    assert ckpt.complete_steps(copy) == [3, 4]


# Tensorstore drops the futures of the leaves that it had not read yet, and Python says so when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("cut", [0.0, 0.5])
def test_truncated_arrays_give_one_clear_error(copy: Path, cut: float) -> None:
    for file in (copy / "4" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[: int(file.stat().st_size * cut)])
    with pytest.raises(ckpt.CheckpointError, match=r"4: checkpoint is truncated or damaged.*delete .*4 to go back to step 3"):
        ckpt.restore_state(copy, jax.eval_shape(make_state), SHARDING)
    gc.collect()


def test_deleted_metadata_gives_a_clear_error(copy: Path) -> None:
    (copy / "4" / "arrays" / "_METADATA").unlink()
    with pytest.raises(ckpt.CheckpointError, match="truncated or damaged"):
        ckpt.restore_state(copy, jax.eval_shape(make_state), SHARDING)


def test_truncated_info_gives_a_clear_error(copy: Path) -> None:
    file = copy / "4" / "info" / "metadata"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ckpt.CheckpointError, match="truncated or damaged"):
        ckpt.read_info(copy)


def test_another_model_is_refused_with_every_difference(saved: Path) -> None:
    def other() -> dict[str, object]:
        state = make_state()
        state["extra"] = jnp.zeros(3)
        state["trainable"]["a"] = jnp.zeros((2, 2))  # type: ignore[index]
        del state["step"]
        return state

    with pytest.raises(ckpt.CheckpointError) as error:
        ckpt.restore_state(saved, jax.eval_shape(other), SHARDING)
    for part in ("missing extra (3,)", "unexpected step", "trainable.a: expected (2, 2) float32, got (64, 65) float32"):
        assert part in str(error.value)


def test_no_checkpoint_and_unknown_step(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match="found none"):
        ckpt.read_info(tmp_path)
    with pytest.raises(ckpt.CheckpointError, match=r"no complete checkpoint of step 1; there are \[3, 4\]"):
        ckpt.read_info(saved, step=1)


def test_frozen_leaves_round_trip(tmp_path: Path) -> None:
    frozen = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "none": None}
    ckpt.save_frozen(tmp_path, frozen)
    assert_same(ckpt.load_frozen(tmp_path, frozen, SHARDING), frozen)


@hypothesis.given(st.integers(0, 99), st.integers(0, 15), st.sampled_from([jnp.float32, jnp.bfloat16]))
@hypothesis.settings(max_examples=20, deadline=None)
def test_checksum_sees_every_bit_and_the_order(index: int, bit: int, dtype: type) -> None:
    x = np.asarray(jax.random.normal(jax.random.key(0), (100,)).astype(dtype))
    flipped = x.copy()
    flipped.view(np.uint16 if x.itemsize == 2 else np.uint32)[index] ^= 1 << bit
    assert int(ckpt.checksum(x)) == int(ckpt.checksum(jnp.asarray(x)))
    assert int(ckpt.checksum(x)) != int(ckpt.checksum(flipped))
    assert int(ckpt.checksum(x)) != int(ckpt.checksum(x[::-1].copy()))


def test_fingerprint_depends_on_names_and_values() -> None:
    trees = [{"a": jnp.ones(3)}, {"b": jnp.ones(3)}, {"a": jnp.zeros(3)}, {}]
    assert len({ckpt.fingerprint(tree) for tree in trees}) == 4
    assert ckpt.fingerprint(trees[0]) == ckpt.fingerprint({"a": jnp.ones(3)})


@pytest.mark.parametrize("preset", [*PRESETS.values(), INFO.preset], ids=lambda preset: preset.name)
def test_presets_survive_json(preset: Preset) -> None:
    assert preset_from_dict(json.loads(json.dumps(dataclasses.asdict(preset)))) == preset


def test_a_preset_of_a_newer_version_is_refused() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(LIBERO10)))
    values["model"]["language"]["lora"]["dropout"] = 0.1
    with pytest.raises(ValueError, match=r"LoraConfig: unknown fields \['dropout'\]"):
        preset_from_dict(values)
    assert LoraConfig(rank=16, alpha=16.0).scale == 1.0


def test_what_a_killed_save_left_behind_is_in_nobodys_way(copy: Path) -> None:
    for name in ("5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp"):
        shutil.copytree(copy / "4" / "arrays", copy / name / "arrays.orbax-checkpoint-tmp")
    save(copy, (5,))
    assert ckpt.complete_steps(copy) == [3, 4, 5]
    assert_same(ckpt.restore_state(copy, jax.eval_shape(make_state), SHARDING), make_state(5))
