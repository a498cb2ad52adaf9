"""The benchmark of training: its keys, that both sides say the same, the count of operations, and bad input."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments import bench_train
from fusevla.evaluate import drawn_batches
from fusevla.evaluate.flops import Workload, train_flops
from fusevla.evaluate.reference_step import reference_batch, reference_loss
from fusevla.model import fuse
from fusevla.presets import Freeze
from fusevla.train.freeze import partition
from tests.experiments.help_text import help_without
from tests.train.synthetic import MODEL, random_batch

SCRIPT = str(Path(bench_train.__file__))
KEYS = {"samples_per_second", "step_seconds", "argument_bytes", "temp_bytes", "flops"}


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    bench_train.main()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few thousand parameters in place of both sizes."""
    monkeypatch.setattr(bench_train, "model_config", lambda size: dataclasses.replace(MODEL, vocab_size=300))


@pytest.mark.usefixtures("small")
def test_compile_only_gives_the_memory_of_both_sides(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "bench.json"
    run(monkeypatch, "--size", "full", "--batch", 2, "--compile-only", "--json", file)
    figures = json.loads(file.read_text())
    for side in ("ours", "reference"):
        assert set(figures[side]) >= KEYS
        assert figures[side]["samples_per_second"] is None
        assert min(figures[side][key] for key in ("argument_bytes", "temp_bytes", "flops")) > 0
    assert figures["ratio"] is None
    assert figures["reference"]["temp_bytes"] > figures["ours"]["temp_bytes"]
    assert figures["versions"]["jax"] == jax.__version__
    assert "temp_bytes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_steps_are_timed_and_both_sides_agree(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(bench_train.MATRIX, "cpu", 64)
    file = tmp_path / "bench.json"
    run(monkeypatch, "--size", "medium", "--batch", 2, "--batches", 1, "--repeats", 2, "--json", file)
    figures = json.loads(file.read_text())
    for side in ("ours", "reference"):
        assert set(figures[side]) >= KEYS
        assert figures[side]["samples_per_second"] == pytest.approx(2 / figures[side]["step_seconds"])
        assert 0 < figures[side]["step_seconds_min"] <= figures[side]["step_seconds"]
        assert min(figures[side][key] for key in ("forward_seconds", "compile_seconds", "utilisation")) > 0
    assert figures["ratio"] == pytest.approx(figures["ours"]["samples_per_second"] / figures["reference"]["samples_per_second"])
    assert figures["loss_difference"] < 1e-5
    assert figures["grad_norm_difference"] < 1e-4


@pytest.mark.usefixtures("small")
def test_half_of_a_batch_reasons_with_lengths_of_the_table() -> None:
    args = bench_train.Args(size="medium", batch=6, batches=3)
    for batch in drawn_batches.draw_batches(bench_train.make_preset(args), args.batches, args.seed):
        mask, causal = np.asarray(batch.observation.token_mask), np.asarray(batch.observation.token_ar_mask)
        acts = np.asarray(batch.diffusion_loss_mask)
        assert acts.sum() == 3
        suffix = causal.sum(axis=1)
        assert set(suffix[acts]) == {1}
        prompts = mask.sum(axis=1) - suffix
        assert set(zip(prompts[~acts].tolist(), suffix[~acts].tolist(), strict=True)) <= set(drawn_batches.PROMPT_AND_THOUGHT)
        assert set(prompts[acts].tolist()) <= set(drawn_batches.PROMPT_OF_ACT)
        np.testing.assert_array_equal(batch.token_loss_mask, causal)


@pytest.mark.parametrize("freeze", ["llm", "all_but_lora"])
def test_operations_are_those_of_the_reference_without_recomputation(freeze: Freeze, monkeypatch) -> None:
    """Counted by walking the traced program, scans by their length."""
    monkeypatch.setattr("fusevla.evaluate.reference_step._recomputed", lambda function: function)
    wide = reference_batch(random_batch(0), 30)
    trainable, frozen = partition(fuse.abstract(MODEL), freeze)

    def gradient(trainable: Any, frozen: Any) -> Any:
        loss = lambda t: reference_loss(eqx.combine(t, frozen), jax.tree.map(jax.numpy.asarray, wide), jax.random.key(0))
        return jax.grad(loss)(trainable)

    traced = jax.make_jaxpr(gradient)(trainable, frozen)
    counted = matrix_flops(traced.jaxpr)
    expected = train_flops(MODEL, freeze, Workload(4, 3, 30, 4 * 29))
    assert expected == pytest.approx(counted, rel=0.1)


def matrix_flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += sum(times * matrix_flops(inner) for inner in jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch", 3), "an even number"),
        (("--repeats", 0), "at least 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(args, message, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--size", "medium", *args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    assert "--compile-only" in help_without(SCRIPT, ("jax", "numpy", "equinox"))
