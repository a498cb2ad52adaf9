"""Memory of a step: from shapes, as the executables that train need it; the search for what fits; the warning."""

import dataclasses
import functools
import io
import os

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fusevla.evaluate.machine import memory_limit
from fusevla.presets import LIBERO10, PRESETS, TINY, DataConfig, Preset, without_lora
from fusevla.run import warn
from fusevla.train.levers import Lever, divisors, levers, plan_flags
from fusevla.train.memory import (
    Memory,
    abstract_inputs,
    largest_of,
    least_memory,
    memory_of,
    planned_memory,
    usable_bytes,
    warning,
)
from fusevla.train.plan import largest_batch, try_levers, try_sizes, try_together, with_batch
from fusevla.train.step import CompiledSteps
from tests.train.synthetic import CAMERAS, MESH, MODEL, TRAIN, random_batch

PRESET = Preset("tiny", MODEL, DataConfig(cameras=CAMERAS), dataclasses.replace(TRAIN, augment=None))


@functools.cache
def planned(size: int) -> Memory:
    return planned_memory(PRESET, size, 12)


def test_the_plan_is_that_of_the_executable_that_trains() -> None:
    state, frozen, _ = abstract_inputs(PRESET, 2, 12)
    steps = CompiledSteps(PRESET.train, MESH)
    steps.compile(state, frozen, random_batch(0, 2), [12])
    trains = memory_of(steps.executables[12])
    assert trains is not None
    assert (trains.argument_bytes, trains.output_bytes) == (planned(2).argument_bytes, planned(2).output_bytes)
    assert trains.temp_bytes == pytest.approx(planned(2).temp_bytes, rel=0.01)


def test_shapes_are_those_of_a_real_batch() -> None:
    _, _, batch = abstract_inputs(PRESET, 3, 12)
    real = random_batch(0, 3)
    assert jax.tree.structure(batch) == jax.tree.structure(real)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)] == [(x.shape, x.dtype) for x in jax.tree.leaves(real)]


def test_more_samples_need_more() -> None:
    assert planned(1).total < planned(2).total
    assert planned(1).argument_bytes < planned(2).argument_bytes
    assert least_memory(PRESET, 2, 12).total == pytest.approx(planned(2).argument_bytes, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    """Every size is compiled as the naive reference."""
    limit = planned(1).total
    fitting = [size for size in (1, 2) if planned(size).total <= limit]
    assert largest_batch(lambda size: planned(size).total, limit, 2, most=2) == max(fitting) == 1


def test_devices_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_memory(PRESET, 6, 12, devices=3) == least_memory(PRESET, 2, 12)
    monkeypatch.setattr("fusevla.train.memory.train_step", lambda state, frozen, batch, **options: (state, batch.actions + 1))
    memory = planned_memory(PRESET, 6, 12, devices=3)
    assert memory == planned_memory(PRESET, 2, 12)
    assert memory.output_bytes < memory.argument_bytes / 20, "the state that is donated counts once"


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="shared evenly"):
        planned_memory(PRESET, 3, 12, devices=2)
    with pytest.raises(ValueError, match="shared evenly"):
        least_memory(PRESET, 3, 12, devices=2)


def test_a_backend_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusevla.train.memory.memory_of", lambda compiled: None)
    monkeypatch.setattr("fusevla.train.memory.train_step", lambda state, frozen, batch, **options: state)
    with pytest.raises(ValueError, match="does not say"):
        planned_memory(PRESET, 1, 12)


@pytest.mark.parametrize("gpu", [0.0, 0.63, -1.0, float("nan"), float("inf")])
def test_a_gpu_without_memory_is_refused(gpu: float) -> None:
    with pytest.raises(ValueError, match="--gpu"):
        usable_bytes(gpu)


def test_some_of_a_gpu_is_left_alone() -> None:
    assert usable_bytes(24.0) == 22_200_000_000


@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    limit=st.integers(0, 800),
    start=st.integers(1, 70),
    unit=st.integers(1, 3),
)
def test_the_search_finds_what_trying_all_finds(steps: list[int], limit: int, start: int, unit: int) -> None:
    """Any memory that does not shrink; it is never measured twice, or beyond the most that is looked for."""
    most, tried = len(steps) * unit, []

    def measure(size: int) -> int:
        assert size % unit == 0
        assert 0 < size <= most
        assert size not in tried
        tried.append(size)
        return sum(steps[: size // unit])

    found = largest_batch(measure, limit, start, unit, most)
    everything = [size for size in range(unit, most + 1, unit) if sum(steps[: size // unit]) <= limit]
    assert found == max(everything, default=0)
    assert {found, found + unit} - {0, most + unit} <= set(tried)


@given(base=st.integers(0, 10**10), slope=st.integers(10**6, 10**9), start=st.integers(1, 64), limit=st.integers(0, 10**11))
def test_a_straight_line_takes_few_measurements(base: int, slope: int, start: int, limit: int) -> None:
    tried = []

    def measure(size: int) -> int:
        tried.append(size)
        return base + slope * size

    found = largest_batch(measure, limit, start)
    assert found == min(max((limit - base) // slope, 0), 1024)
    assert len(tried) <= 5


def test_sizes_are_measured_with_the_batch_they_are_for() -> None:
    largest, sizes = try_sizes(with_batch(PRESET, 4), fake, fake(with_batch(PRESET, 9)).total)
    assert largest == 9
    assert {4, 9, 10} <= set(sizes)
    assert all(memory == fake(with_batch(PRESET, size)) for size, memory in sizes.items())
    accumulating = Lever("accumulate", 2, "").pull(with_batch(PRESET, 4))
    largest, sizes = try_sizes(accumulating, fake, fake(with_batch(accumulating, 12)).total, devices=2)
    assert largest == 12
    assert all(size % 4 == 0 for size in sizes)


SAVES = {"bfloat16": 30, "int8": 60, "nf4": 80, "all_but_lora": 100}


def fake(preset: Preset) -> Memory:
    """Ten for each sample at a time, as much again where nothing is recomputed, and less for everything stored smaller."""
    train = preset.train
    saved = sum(SAVES.get(kind, 0) for kind in (train.moments, train.base, train.freeze))
    return Memory(500 - saved, train.batch_size // train.accumulate * (10 if preset.model.remat == "full" else 20))


def test_levers_are_ordered_from_harmless_to_costly() -> None:
    flags = [lever.flag for lever in levers(PRESET, [2])]
    assert flags == [
        "--remat full",
        "--accumulate 2",
        "--moments bfloat16",
        "--moments int8",
        "--base int8",
        "--base nf4",
        "--freeze all_but_lora",
    ]


def test_what_a_preset_does_already_is_no_lever() -> None:
    everything = PRESET
    for lever in levers(PRESET, [4]):
        everything = lever.pull(everything)
    assert levers(everything) == []
    assert (everything.model.remat, everything.train.base, everything.train.accumulate) == ("full", "nf4", 4)
    names = lambda preset: {lever.name for lever in levers(preset)}
    assert names(LIBERO10) == {"moments", "base", "freeze"}
    assert names(Lever("freeze", "none", "").pull(LIBERO10)) == {"moments", "freeze"}
    bare = dataclasses.replace(LIBERO10, model=without_lora(LIBERO10.model))
    assert names(bare) == {"moments"}, "without LoRA nothing is frozen"
    assert names(PRESETS["libero-small"]) == {"remat", "moments", "freeze"}


@given(st.integers(1, 100), st.integers(1, 10))
def test_parts_are_equal(samples: int, above: int) -> None:
    assert divisors(samples, above) == [parts for parts in range(1, 101) if samples % parts == 0 and parts > above]


def test_each_lever_is_tried_alone() -> None:
    preset = with_batch(PRESET, 8)
    tried = {lever.flag: memory.total for lever, memory in try_levers(preset, fake, limit=580, largest=4)}
    assert tried == {
        "--remat full": 580,
        "--accumulate 2": 580,
        "--moments bfloat16": 630,
        "--moments int8": 600,
        "--base int8": 600,
        "--base nf4": 580,
        "--freeze all_but_lora": 560,
    }


def test_parts_are_tried_until_one_is_enough() -> None:
    accumulated = lambda limit, largest, devices=1: [
        lever.value for lever, _ in try_levers(with_batch(PRESET, 8), fake, limit, largest, devices) if lever.name == "accumulate"
    ]
    assert accumulated(540, 5) == [2, 4]
    assert accumulated(540, 2) == [4]
    assert accumulated(100, 0) == [8]
    assert accumulated(100, 0, devices=2) == [4]


@pytest.mark.parametrize(("limit", "flags"), [(510, 2), (480, 3), (440, 4), (300, 5), (100, 5)])
def test_levers_together_are_the_first_that_are_enough(limit: int, flags: int) -> None:
    preset = with_batch(PRESET, 8)
    tried = try_levers(preset, fake, limit, 0)
    result = try_together(preset, fake, limit, tried)
    assert result is not None
    chosen, memory = result
    everything = preset
    for lever in chosen:
        everything = lever.pull(everything)
    assert memory == fake(everything)
    assert len({lever.name for lever in chosen}) == len(chosen) <= flags
    assert (memory.total <= limit) == (limit >= 300)


def test_nothing_is_put_together_of_one_lever() -> None:
    assert try_together(PRESET, fake, 0, [(Lever("remat", "full", ""), fake(Lever("remat", "full", "").pull(PRESET)))]) is None
    assert try_together(PRESET, fake, 0, []) is None


def test_the_warning_says_what_is_needed_and_what_helps() -> None:
    preset = Lever("freeze", "none", "").pull(with_batch(LIBERO10, 16))
    text = warning(Memory(11_500_000_000, 18_000_000_000, 300_000_000), 22_200_000_000, preset)
    assert text is not None
    assert text.startswith("warning: a training step needs at least 29.8 GB of memory (11.5 GB for weights")
    assert "18.3 GB to work in) and there are 22.2 GB" in text
    assert "--accumulate 2, --moments bfloat16, --moments int8, --freeze all_but_lora, --batch" in text
    assert text.endswith("python experiments/plan_memory.py --preset libero10 --batch 16 --freeze none --gpu 24.0")


def test_arguments_alone_are_said_to_be_alone() -> None:
    assert "without any to work in" in str(warning(Memory(11_500_000_000, 0), 8_000_000_000, LIBERO10))


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 200), st.integers(1, 16))
def test_a_warning_is_given_exactly_where_memory_is_short(arguments: int, work: int, limit: int, batch: int) -> None:
    memory, preset = Memory(arguments, work), with_batch(LIBERO10, batch)
    assert (warning(memory, limit, preset) is None) == (arguments + work <= limit)
    assert warning(memory, None, preset) is None


def test_the_command_of_a_plan_names_what_differs_from_the_preset() -> None:
    assert plan_flags(LIBERO10) == ["--preset libero10", "--batch 4"]
    changed = Lever("remat", "none", "").pull(Lever("base", "int8", "").pull(with_batch(LIBERO10, 64)))
    assert plan_flags(changed) == ["--preset libero10", "--batch 64", "--base int8", "--remat none"]
    tiny = dataclasses.replace(LIBERO10, model=without_lora(TINY))
    assert plan_flags(tiny) == ["--preset libero10", "--batch 4", "--lora False", "--model tiny", "--remat none"]


def test_of_several_executables_the_hungriest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    executables = [jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((size,), "float32")).compile() for size in (8, 64, 16)]
    found = largest_of(executables)
    assert found is not None
    assert found == memory_of(executables[1])
    assert (found.argument_bytes, found.output_bytes) == (256, 256)
    assert largest_of([]) is None
    monkeypatch.setattr("fusevla.train.memory.memory_of", lambda compiled: None)
    assert largest_of(executables) is None


def test_the_limit_of_a_cpu_is_what_is_taken_and_what_is_free() -> None:
    limit = memory_limit()
    assert limit is not None
    assert 0 < limit < 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_run_warns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusevla.run.memory_limit", lambda: 5_000_000_000)
    written = io.StringIO()
    console = Console(file=written, width=80)
    warn(Memory(2_000_000_000, 2_000_000_000), LIBERO10, console)
    warn(None, LIBERO10, console)
    assert written.getvalue() == ""
    warn(Memory(2_000_000_000, 4_000_000_000), LIBERO10, console)
    assert written.getvalue().startswith("warning: a training step needs at least 6.0 GB of memory")
