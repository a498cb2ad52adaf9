"""Start-up: the step compiled from shapes alone is the step, and errors come out as themselves."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fusevla.data.annotations import Thought
from fusevla.data.samples import Sample
from fusevla.presets import DataConfig, Preset
from fusevla.tokens.protocol import TokenizedText
from fusevla.train import startup
from fusevla.train.job import abstract_frozen, abstract_state
from fusevla.train.sharding import replicated, split
from fusevla.train.startup import PARTS, Clock, Compilation, example_batch
from fusevla.train.step import CompiledSteps, abstract_batch
from tests.train.synthetic import CAMERAS, MESH, MODEL, TRAIN, fresh, random_batch

PRESET = Preset("small", MODEL, DataConfig(text_buckets=(12, 16), max_token_len=16), TRAIN)


def sample(cameras: tuple[str, ...], length: int = 9) -> Sample:
    flags, side = np.ones(length, bool), MODEL.vision.image_size
    return Sample(
        images={name: np.zeros((side, side, 3), np.uint8) for name in cameras},
        state=np.zeros(MODEL.action_dim, np.float32),
        text=TokenizedText(np.ones(length, np.int32), flags, flags, flags, diffusion=True),
        actions=np.zeros((MODEL.action_horizon, MODEL.action_dim), np.float32),
        action_is_pad=np.zeros(MODEL.action_horizon, bool),
        thought=Thought("", None, "act"),
    )


@dataclasses.dataclass
class Source:
    cameras: tuple[str, ...]

    def __len__(self) -> int:
        return 1

    def __call__(self, index: int, epoch: int, seed: int) -> Sample:
        return sample(self.cameras)


def test_the_batch_is_foreseen_to_the_dtype() -> None:
    foreseen, real = example_batch(PRESET, [Source(CAMERAS)]), random_batch(0)
    described = lambda batch: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_batch(batch, 12, split(MESH)))
    assert described(foreseen) == described(real)


def test_a_camera_that_only_the_second_set_has_is_foreseen() -> None:
    assert sorted(example_batch(PRESET, [Source(CAMERAS[:1]), Source(CAMERAS)]).observation.images) == sorted(CAMERAS)


def test_shapes_alone_give_the_very_program_that_arrays_give() -> None:
    """Bit for bit the same run: the same text goes to the compiler, shardings and donations included."""
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(MESH))
    abstract = jax.tree.map(place, (abstract_state(PRESET), abstract_frozen(PRESET)))
    lower = CompiledSteps(TRAIN, MESH)._jitted.lower
    texts = [lower(*trees, abstract_batch(random_batch(0), 12, split(MESH))).as_text() for trees in (abstract, fresh(TRAIN))]
    assert texts[0] == texts[1]


class Slow(CompiledSteps):
    """Compiling takes until ``go``, and ends as told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.error, self.seconds, self.cancelled = threading.Event(), error, {12: 1.25, 16: 2.0}, False

    def compile(self, state: Any, frozen: Any, batch: Any, lengths: Any, cancelled: Any = None) -> dict[int, float]:
        assert self.go.wait(30)
        self.cancelled = cancelled()
        if self.error is not None:
            raise self.error
        return self.seconds


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(error: Exception | None = None) -> tuple[Compilation, Slow]:
        slow = Slow(error)
        monkeypatch.setattr(startup, "CompiledSteps", lambda *_: slow)
        return Compilation(PRESET, [Source(CAMERAS)], [12, 16], MESH), slow

    return make


def test_weights_load_meanwhile(compiling: Any) -> None:
    compilation, slow = compiling()
    with compilation:
        slow.go.set()  # never reached if compiling held things up: it waits for this line
    assert compilation.wait() is slow
    assert not slow.cancelled
    assert compilation.figures() == {"compile_seconds": 3.25, "compile_seconds_by_text_bucket": {"12": 1.25, "16": 2.0}}


@pytest.mark.parametrize("error", [None, RuntimeError("the compiler's own")])
def test_weights_that_cannot_be_read_are_the_error_and_end_the_compiling(compiling: Any, error: Exception | None) -> None:
    compilation, slow = compiling(error)
    with pytest.raises(FileNotFoundError, match="no weights"), compilation:
        raise FileNotFoundError("no weights")
    slow.go.set()
    assert compilation._done.exception(30) is error
    assert slow.cancelled


def test_the_compilers_error_comes_out_when_waited_for(compiling: Any) -> None:
    compilation, slow = compiling(RuntimeError("out of registers"))
    with compilation:
        slow.go.set()
    with pytest.raises(RuntimeError, match="out of registers"):
        compilation.wait()


def test_nothing_compiles_once_cancelled() -> None:
    steps = CompiledSteps(TRAIN, MESH)
    assert steps.compile(*fresh(TRAIN), random_batch(0), [12, 16], lambda: True) == {}


def test_the_parts_add_up_to_the_whole() -> None:
    clock = Clock()
    assert clock.figures()["seconds_to_first_step"] is None
    assert list(clock.seconds) == ["imports"]
    for part in ("data", "weights", "compile"):
        clock.lap(part)
    said = clock.first_step()
    figures = clock.figures()
    parts = figures["seconds_to_first_step_by_part"]
    assert list(parts) == [part for part in PARTS if part not in ("validation", "first_batch")]
    assert figures["seconds_to_first_step"] == pytest.approx(sum(clock.seconds.values()), abs=0.01)
    assert all(name in said for name in ("after the command", "imports", "first step"))


def test_the_interpreters_own_start_counts() -> None:
    age = startup.process_age()
    if not Path("/proc/self/stat").is_file():
        assert age == 0
    else:
        assert 0 < age < 24 * 3600
        assert startup.process_age() >= age
