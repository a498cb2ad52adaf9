"""What is frozen: the published counts at full size (abstract), dtypes, and structure rather than names."""

import csv
import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from fusevla.model import fuse
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import PI05, TINY, Freeze, ModelConfig
from fusevla.train.freeze import FreezeError, count_parameters, dtype_spec, has_adapters, partition, trainable_spec
from tests.train.synthetic import small_model

# Totals of openpi's own freeze filter over the real model, see listing/summary.json of the golden set:
# (LoRA on language, LoRA on action) -> (trainable, frozen)
PUBLISHED = {
    (True, True): (466_957_072, 2_936_464_384),
    (True, False): (872_771_344, 2_508_531_712),
    (False, True): (2_947_619_600, 427_932_672),
    (False, False): (3_353_433_872, 0),
}


def config_with_lora(config: ModelConfig, language: bool, action: bool) -> ModelConfig:
    return dataclasses.replace(
        config,
        language=config.language if language else dataclasses.replace(config.language, lora=None),
        action=config.action if action else dataclasses.replace(config.action, lora=None),
    )


def split_counts(model: Pi0Fuse, mode: Freeze) -> tuple[int, int]:
    trainable, frozen = eqx.partition(model, trainable_spec(model, mode))
    return count_parameters(trainable), count_parameters(frozen)


@pytest.mark.parametrize("lora", PUBLISHED, ids=str)
def test_llm_freezes_what_the_published_recipe_freezes(lora: tuple[bool, bool]) -> None:
    model = fuse.abstract(config_with_lora(PI05, *lora))
    assert split_counts(model, "llm") == PUBLISHED[lora]


@pytest.mark.parametrize(
    ("name", "lora"),
    [("pi05_lora", (True, True)), ("pi05_paligemma_lora_only", (True, False)), ("pi05_expert_lora_only", (False, True))],
)
def test_llm_agrees_with_the_listing_leaf_by_leaf(golden_dir: Path, name: str, lora: tuple[bool, bool]) -> None:
    listing = golden_dir / "listing" / f"{name}.tsv"
    if not listing.is_file():
        pytest.skip(f"{listing} is not in the committed subset")
    rows = list(csv.DictReader(listing.read_text().splitlines(), delimiter="\t"))
    expected = sorted((row["shape"].replace(" ", ""), row["freeze"].split("->")[0]) for row in rows)
    model = fuse.abstract(config_with_lora(PI05, *lora))
    spec = trainable_spec(model, "llm")
    named = {True: "trainable", False: "frozen"}
    leaves = zip(jax.tree.leaves(model), jax.tree.leaves(spec), strict=True)
    got = sorted((str(list(leaf.shape)).replace(" ", ""), named[trains]) for leaf, trains in leaves)
    assert got == expected


def test_embedder_follows_the_language_expert() -> None:
    for language in (True, False):
        spec = trainable_spec(fuse.abstract(config_with_lora(TINY, language, True)), "llm")
        assert jax.tree.leaves(spec.embedder) == [not language]


def test_all_but_lora_trains_adapters_and_heads_only() -> None:
    model = fuse.abstract(TINY)
    trainable, _ = eqx.partition(model, trainable_spec(model, "all_but_lora"))
    assert not jax.tree.leaves((trainable.vision, trainable.embedder))
    heads = (trainable.action_in_proj, trainable.time_mlp_in, trainable.time_mlp_out, trainable.action_out_proj)
    assert len(jax.tree.leaves(heads)) == 8
    assert len(jax.tree.leaves((trainable.language, trainable.action))) == 2 * 5 * 2


def test_all_but_lora_without_lora_is_refused() -> None:
    model = fuse.abstract(config_with_lora(TINY, False, False))
    assert not has_adapters(model)
    with pytest.raises(FreezeError, match="neither expert carries LoRA"):
        trainable_spec(model, "all_but_lora")


@pytest.mark.parametrize("mode", ["llm", "all_but_lora", "none"])
def test_partition_casts_and_recombines(mode: Freeze) -> None:
    model = small_model()
    trainable, frozen = partition(model, mode)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == (set() if mode == "none" else {jnp.dtype(jnp.bfloat16)})
    combined = eqx.combine(trainable, frozen)
    assert str(jax.tree.structure(combined)) == str(jax.tree.structure(model))
    assert jax.tree.map(lambda leaf: leaf.dtype, combined) == dtype_spec(model, mode)
    for kept, original in zip(jax.tree.leaves(trainable), jax.tree.leaves(eqx.filter(model, trainable_spec(model, mode)))):
        assert (kept == original).all()


def test_partition_works_on_abstract_leaves() -> None:
    trainable, frozen = partition(fuse.abstract(PI05), "llm")
    assert (count_parameters(trainable), count_parameters(frozen)) == PUBLISHED[True, True]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((trainable, frozen)))
