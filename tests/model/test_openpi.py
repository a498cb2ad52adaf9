"""openpi checkpoints: names, both layouts, every leaf accounted for, damage, and the reference's own file."""

import csv
import dataclasses
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusevla.model.fetch import find_params
from fusevla.model.fuse import abstract
from fusevla.model.openpi import CheckpointError, load_params, make_plan, read_metadata, save_params
from fusevla.model.openpi_names import entries, infer_config, leaves_by_name, name_table
from fusevla.presets import PI05, LoraConfig, ModelConfig, without_lora
from fusevla.train.freeze import dtype_spec

GOLDEN = Path(os.environ.get("FUSEVLA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
needs_golden = pytest.mark.skipif(not (GOLDEN / "ckpt_orbax").is_dir(), reason="needs the complete golden folder")

SMALL = ModelConfig(
    vision=dataclasses.replace(PI05.vision, width=8, depth=2, mlp_dim=12, num_heads=2, patch_size=56),
    language=dataclasses.replace(PI05.language, width=12, depth=3, mlp_dim=20, num_heads=4, head_dim=6, lora=LoraConfig(2, 2.0)),
    action=dataclasses.replace(PI05.action, width=8, depth=3, mlp_dim=16, num_heads=4, head_dim=6, lora=LoraConfig(3, 3.0)),
    vocab_size=32,
    action_dim=5,
)


def with_kv_heads(config: ModelConfig, kv_heads: int) -> ModelConfig:
    experts = {name: dataclasses.replace(getattr(config, name), num_kv_heads=kv_heads) for name in ("language", "action")}
    return dataclasses.replace(config, **experts)


def with_lora(config: ModelConfig, *experts: str) -> ModelConfig:
    """``config`` with the published adapters on ``experts`` and none on the others."""
    bare = without_lora(config)
    return dataclasses.replace(bare, **{name: getattr(config, name) for name in experts})


def random_model(config: ModelConfig, seed: int):
    """A model of random numbers, made without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), abstract(config))


def read_tree(folder: Path) -> dict:
    """The whole tree as NumPy arrays, by orbax alone."""
    handler = ocp.PyTreeCheckpointHandler()
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    return ocp.PyTreeCheckpointer().restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))


def assert_equal(model, other) -> None:
    assert jax.tree.structure(model) == jax.tree.structure(other)
    for (name, a), b in zip(leaves_by_name(model).items(), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def rewrite(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose dict of leaves went through ``change``."""
    tree = read_tree(source)
    flat = {"/".join(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    change(flat)
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    ocp.PyTreeCheckpointer().save(target, nested)
    return target


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL, 0)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "params"
    save_params(folder, model)
    return folder


# --- the table ---------------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize(
    ("listing", "experts", "leaves", "parameters"),
    [
        ("pi05_base", (), 51, 3_353_433_872),
        ("pi05_lora", ("language", "action"), 71, 3_353_433_872 + 49_987_584),
        ("pi05_paligemma_lora_only", ("language",), 61, None),
        ("pi05_expert_lora_only", ("action",), 61, None),
    ],
)
def test_names_and_shapes_are_those_of_the_published_model(listing, experts, leaves, parameters) -> None:
    if not (GOLDEN / "listing").is_dir():
        pytest.skip("this golden set has no listing")
    wanted = entries(abstract(with_lora(PI05, *experts)))
    with open(GOLDEN / "listing" / f"{listing}.tsv", newline="") as file:
        rows = {row["path"]: tuple(json.loads(row["shape"])) for row in csv.DictReader(file, delimiter="\t")}
    assert {path: entry.shape for path, entry in wanted.items()} == rows
    assert len(wanted) == leaves
    assert parameters in (None, sum(entry.size for entry in wanted.values()))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_table_names_every_leaf_once(kv_heads) -> None:
    config = with_kv_heads(SMALL, kv_heads)
    named = [leaf for leaves in name_table(config).values() for leaf in leaves]
    assert sorted(named) == sorted(leaves_by_name(abstract(config)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("experts", [(), ("language",), ("language", "action")])
def test_sizes_are_told_from_shapes(kv_heads, experts) -> None:
    config = with_lora(with_kv_heads(SMALL, kv_heads), *experts)
    shapes = {path: entry.shape for path, entry in entries(abstract(config)).items()}
    assert infer_config(shapes) == config


# --- round trips -------------------------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31 - 1), value=st.booleans())
def test_a_saved_model_comes_back_bit_for_bit(seed, value, tmp_path_factory) -> None:
    model = random_model(SMALL, seed)
    folder = tmp_path_factory.mktemp("round")
    save_params(folder / "params", model, trailing_value=value)
    assert all((leaf.keys[-1] == "value") == value for leaf in read_metadata(folder).values())
    assert_equal(load_params(folder, SMALL), model)


def test_equal_heads_join_query_key_and_value_on_disk(tmp_path) -> None:
    config = with_kv_heads(SMALL, 4)
    model = random_model(config, 1)
    save_params(tmp_path / "params", model)
    stored = read_metadata(tmp_path)
    path = "PaliGemma/llm/layers/attn/qkv_einsum_1/w"
    assert stored[path].shape == (3, 3, 4, 8, 6)
    assert not [name for name in stored if "/q_einsum" in name or "/kv_einsum" in name]
    tree = read_tree(tmp_path / "params")
    joined = tree["params"]["PaliGemma"]["llm"]["layers"]["attn"]["qkv_einsum_1"]["w"]
    np.testing.assert_array_equal(joined[:, 0], model.action.layers.q.weight)
    np.testing.assert_array_equal(joined[:, 1:], model.action.layers.kv.weight)
    assert_equal(load_params(tmp_path, config), model)
    assert load_params(tmp_path, config, jnp.bfloat16).action.layers.kv.weight.dtype == jnp.bfloat16


def test_leaves_arrive_in_the_dtype_asked_for(saved, model) -> None:
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert_equal(load_params(saved, SMALL, jnp.bfloat16), expected)
    spec = dtype_spec(abstract(SMALL), "llm")
    assert_equal(load_params(saved, SMALL, spec), jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), model, spec))


def test_leaves_arrive_in_the_sharding_asked_for(saved, model) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded = load_params(saved, SMALL, sharding=jax.tree.map(lambda _: sharding, abstract(SMALL)))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {sharding}
    assert_equal(loaded, model)


def test_existing_folders_are_never_overwritten(saved, model) -> None:
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_params(saved, model)


# --- LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(), ("language",), ("action",)])
def test_a_base_checkpoint_gets_fresh_adapters_where_it_has_none(kept, tmp_path) -> None:
    source = random_model(with_lora(SMALL, *kept), 2)
    save_params(tmp_path / "params", source)
    loaded = load_params(tmp_path, SMALL, jnp.bfloat16, key=jax.random.key(7))
    found, before = leaves_by_name(loaded), leaves_by_name(source)
    assert loaded.config == SMALL
    assert set(found) == set(leaves_by_name(abstract(SMALL)))
    for name in set(found) - set(before):
        leaf = np.asarray(found[name], np.float32)
        assert found[name].dtype == jnp.bfloat16, name
        assert np.all(leaf == 0) if name.endswith(".b") else 0.002 < leaf.std() < 0.05, name
    for name in before:
        np.testing.assert_array_equal(found[name], before[name].astype(jnp.bfloat16), err_msg=name)


def test_fresh_adapters_follow_the_key(saved, tmp_path) -> None:
    save_params(tmp_path / "params", random_model(without_lora(SMALL), 2))
    first, again, other = (load_params(tmp_path, SMALL, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert not np.array_equal(first.action.layers.q.adapter.a, other.action.layers.q.adapter.a)


def test_adapters_that_the_model_lacks_are_unexpected(saved) -> None:
    with pytest.raises(CheckpointError, match="20 unexpected") as caught:
        load_params(saved, without_lora(SMALL))
    assert str(caught.value).count("lora_") == 20
    bare = load_params(saved, without_lora(SMALL), ignore_extra=True)
    assert set(leaves_by_name(bare)) == set(leaves_by_name(abstract(without_lora(SMALL))))


def test_half_of_an_experts_adapters_is_missing_not_fresh(saved, tmp_path) -> None:
    lost = "PaliGemma/llm/layers/attn/q_einsum/lora_b"
    rewrite(saved, tmp_path / "params", lambda flat: flat.pop(f"params/{lost}"))
    with pytest.raises(CheckpointError, match=r"1 missing [^\n]*\n +" + lost):
        load_params(tmp_path, SMALL)


# --- every leaf accounted for --------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_missing_extra_and_misshapen_leaf_is_named_at_once(data, saved, tmp_path_factory) -> None:
    base = sorted(path for path, entry in entries(abstract(SMALL)).items() if entry.expert is None)
    bad = data.draw(st.lists(st.sampled_from(base), min_size=3, max_size=6, unique=True))
    lost, bent = bad[: len(bad) // 2], bad[len(bad) // 2 :]

    def damage(flat: dict) -> None:
        for path in lost:
            del flat[f"params/{path}"]
        for path in bent:
            flat[f"params/{path}"] = np.zeros((7, *flat[f"params/{path}"].shape), np.float32)
        flat["params/PaliGemma/llm/surprise"] = np.zeros(3, np.float32)

    folder = rewrite(saved, tmp_path_factory.mktemp("bad") / "params", damage)
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder, SMALL)
    message = str(caught.value)
    assert f"{len(lost)} missing" in message
    assert f"{len(bent)} misshapen" in message
    assert "1 unexpected" in message
    assert "--ignore-extra" in message
    assert all(f" {path} [" in message for path in lost)
    assert all(f" {path}: expected [" in message for path in bent)
    assert "PaliGemma/llm/surprise [3]" in message


def test_unexpected_leaves_pass_on_request(saved, model, tmp_path) -> None:
    rewrite(saved, tmp_path / "params", lambda flat: flat.update({"params/more/here": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"more/here \[2\]"):
        load_params(tmp_path, SMALL)
    assert make_plan(tmp_path, SMALL, ignore_extra=True).extra == ("more/here",)
    assert_equal(load_params(tmp_path, SMALL, ignore_extra=True), model)


def test_integers_are_not_weights(saved, tmp_path) -> None:
    path = "params/action_in_proj/bias"
    rewrite(saved, tmp_path / "params", lambda flat: flat.update({path: np.zeros_like(flat[path], np.int32)}))
    with pytest.raises(CheckpointError, match="action_in_proj/bias: expected floating point, found int32"):
        load_params(tmp_path, SMALL)


# --- damage --------------------------------------------------------------------------------------------------------------


def copy_of(saved: Path, target: Path) -> Path:
    for file in (file for file in saved.rglob("*") if file.is_file()):
        copy = target / file.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target


def data_files(folder: Path) -> list[Path]:
    return sorted((file for file in folder.rglob("d/*") if file.is_file()), key=lambda file: -file.stat().st_size)


@pytest.fixture
def leftovers() -> Iterator[None]:
    """Orbax leaves coroutines behind when a read fails: collects them here, so that they blame no other test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("damage", ["truncated", "removed", "emptied"])
def test_damaged_data_are_an_error_that_names_leaves(damage, saved, tmp_path) -> None:
    folder = copy_of(saved, tmp_path / "params")
    victim = data_files(folder)[0]
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 0 if damage == "emptied" else victim.stat().st_size // 2])
    with pytest.raises(CheckpointError) as caught:
        load_params(folder, SMALL)
    assert "unreadable" in str(caught.value)
    assert "PaliGemma/" in str(caught.value)
    assert "copy the checkpoint again" in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.usefixtures("leftovers")
def test_a_missing_chunk_is_an_error_and_not_zeros(tmp_path) -> None:
    tree = {"params": {"a": {"w": np.ones(4, np.float32)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "params", tree)
    chunks = [file for file in (tmp_path / "params" / "params.a.w").iterdir() if not file.name.startswith(".")]
    assert len(chunks) == 1
    chunks[0].unlink()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    request = ocp.args.PyTreeRestore(
        item={"params": {"a": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}},
        restore_args={"params": {"a": {"w": ocp.ArrayRestoreArgs(dtype=jnp.float32, sharding=here)}}},
        partial_restore=True,
    )
    with pytest.raises(Exception, match=r"(?i)missing|not found"):
        ocp.PyTreeCheckpointer().restore(tmp_path / "params", args=request)


def test_damaged_metadata_are_an_error(saved, tmp_path) -> None:
    folder = copy_of(saved, tmp_path / "params")
    (folder / "_METADATA").write_text((folder / "_METADATA").read_text()[:100])
    with pytest.raises(CheckpointError, match="metadata cannot be read"):
        load_params(folder, SMALL)


def test_other_trees_are_refused(tmp_path) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "params", {"opt": {"mu": np.zeros(2)}, "params": {"w": np.zeros(2)}})
    with pytest.raises(CheckpointError, match="found opt, params at the top"):
        read_metadata(tmp_path)


# --- where it lies -------------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_told(saved, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="nothing of that name"):
        find_params(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="this folder holds nothing"):
        find_params(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"this folder holds weights\.bin"):
        find_params(tmp_path)
    with pytest.raises(CheckpointError, match="this is a file"):
        find_params(tmp_path / "weights.bin")
    copy_of(saved, tmp_path / "5" / "params")
    with pytest.raises(CheckpointError, match=r"did you mean .*5/params"):
        find_params(tmp_path)
    assert find_params(tmp_path / "5") == find_params(tmp_path / "5" / "params") == tmp_path / "5" / "params"


def test_a_url_is_fetched_once(saved, model, tmp_path, monkeypatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path))
    files = fsspec.filesystem("memory")
    files.put(f"{saved}/", "/bucket/base/params/", recursive=True)
    try:
        assert_equal(load_params("memory://bucket/base", SMALL), model)
    finally:
        files.rm("/bucket", recursive=True)
    assert_equal(load_params("memory://bucket/base", SMALL), model)
    with pytest.raises(CheckpointError, match=r"cannot be fetched[^\n]*\n.*copy the folder from another machine"):
        load_params("memory://bucket/other", SMALL)
    assert not list(tmp_path.rglob("*.partial"))


# --- the reference's own file --------------------------------------------------------------------------------------------


@needs_golden
def test_the_reference_checkpoint_is_read_exactly() -> None:
    folder = next(path for path in sorted((GOLDEN / "ckpt_orbax").iterdir()) if (path / "params").is_dir())
    stored = read_metadata(folder)
    config = infer_config({path: leaf.shape for path, leaf in stored.items()})
    assert all(leaf.keys[-1] == "value" for leaf in stored.values())
    loaded = load_params(folder, config)
    values = np.load(GOLDEN / "params_base.npz")
    found = leaves_by_name(loaded)
    wanted = entries(loaded)
    assert set(wanted) >= set(values.files)
    for path in values.files:
        assert len(wanted[path].leaves) == 1
        np.testing.assert_array_equal(found[wanted[path].leaves[0]], values[path], err_msg=path)


@needs_golden
def test_the_reference_model_round_trips_with_its_adapters(tmp_path) -> None:
    base, lora = np.load(GOLDEN / "params_base.npz"), np.load(GOLDEN / "params_lora_extra.npz")
    values = {**base, **lora}
    config = infer_config({path: value.shape for path, value in values.items()})
    nested: dict = {}
    for path, value in values.items():
        *parents, last = ("params", *path.split("/"), "value")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    ocp.PyTreeCheckpointer().save(tmp_path / "params", nested)
    loaded = load_params(tmp_path, config)
    save_params(tmp_path / "again", loaded, trailing_value=True)
    tree = read_tree(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, tree, nested)
