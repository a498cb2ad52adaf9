"""From flags to a preset: the published tables, from-scratch rules, what is missing, and what resume refuses."""

import dataclasses
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fusevla.presets import FULL, LIBERO10, LIBERO100, TINY, Preset, ScheduleConfig
from fusevla.train.missing import describe, missing
from fusevla.train.request import Request, RequestError, conflicts, continued, resolve


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data, no caches, no network."""

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    return tmp_path


@pytest.mark.parametrize(("name", "preset"), [("libero10", LIBERO10), ("libero100", LIBERO100)])
def test_without_flags_the_preset_is_as_published(name: str, preset: Preset) -> None:
    assert resolve(Request(preset=name)).preset == preset


def test_published_tables() -> None:
    assert LIBERO10.train.schedule == ScheduleConfig(5e-5, 5e-6, 300, 10_000)
    assert LIBERO100.train.schedule == ScheduleConfig(5e-5, 5e-6, 1_000, 30_000)
    assert (LIBERO10.train.steps, LIBERO100.train.steps, LIBERO10.train.batch_size) == (10_000, 30_000, 4)
    assert (LIBERO10.model, LIBERO10.num_steps, LIBERO10.data.max_token_len) == (FULL, 10, 415)


def test_from_scratch_trains_everything_on_its_own_schedule() -> None:
    resolved = resolve(Request(preset="libero10", weights="none", model="tiny", steps=200))
    train, model = resolved.preset.train, resolved.preset.model
    assert train.schedule == ScheduleConfig(peak=1e-3, end=1e-4, warmup_steps=20, decay_steps=200)
    assert model.vision == TINY.vision
    assert model.language.lora is None
    assert model.action.lora is None
    assert (resolved.weights, resolved.tokenizer) == (None, "train")
    assert resolve(Request(preset="libero10", weights="none", lora=True)).preset.model.language.lora is not None


def test_memory_flags_reach_the_preset_and_may_not_change_on_resume() -> None:
    preset = resolve(Request("libero10", batch=8, accumulate=4, moments="int8")).preset
    assert (preset.train.batch_size, preset.train.accumulate, preset.train.moments) == (8, 4, "int8")
    clash = conflicts(Request(accumulate=2, moments="float32"), preset)
    assert clash == ["--moments float32 (the run has int8)", "--accumulate 2 (the run has 4)"]


def test_steps_set_the_length_of_the_decay() -> None:
    schedule = resolve(Request(preset="libero10", steps=50, learning_rate=1e-4)).preset.train.schedule
    assert schedule == ScheduleConfig(peak=1e-4, end=1e-5, warmup_steps=5, decay_steps=50)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(preset="libero"), "--preset: expected one of"),
        (Request(preset="libero10", batch=0, log_every=-1), "--batch: expected at least 1, got 0; --log-every"),
        (Request("libero10", accumulate=0), "--accumulate: expected at least 1, got 0"),
        (Request("libero10", accumulate=8), "--accumulate: the batch's 4 samples cannot be divided into 8 equal parts"),
        (Request("libero10", batch=10, accumulate=4), "take a --batch that is a multiple of 4"),
        (Request("libero10", more_data=("b",), data_weights=(1.0,)), "expected one number for each of the 2 sets"),
        (Request("libero10", more_data=("b",), data_weights=(1.0, -2.0)), "--data-weights: expected positive numbers, got"),
    ],
)
def test_nonsense_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(request_)


def test_one_message_for_everything_missing(bare_machine: Path) -> None:
    resolved = resolve(Request(preset="libero10"))
    text = "\n".join(missing(resolved)) + describe(resolved, bare_machine / "runs")
    for part in (
        "hf download yilin-wu/libero-10",
        "libero-10-r/cot_simple.json",
        "gs://openpi-assets/checkpoints/pi05_base/params",
        "gs://big_vision/paligemma_tokenizer.model",
        "10000 steps of 4 samples",
        "freeze=llm",
    ):
        assert part in text


def test_only_what_is_missing_is_named(bare_machine: Path) -> None:
    resolved = resolve(Request(preset="libero10", weights="none", data=str(bare_machine / "set")))
    (bare_machine / "set" / "meta").mkdir(parents=True)
    (bare_machine / "set" / "meta" / "info.json").write_text("{}")
    assert [problem.split(" (")[0] for problem in missing(resolved)] == ["reasoning annotations"]
    (bare_machine / "set" / "cot_simple.json").write_text("{}")
    assert missing(resolved) == []
    assert "nothing at /nowhere" in missing(resolve(Request(preset="libero10", weights="/nowhere")))[2]


def test_downloads_are_found_without_flags(bare_machine: Path) -> None:
    for file in ("data/libero-10/meta/info.json", "data/libero-10-r/cot_simple.json", "cache/paligemma_tokenizer.model"):
        (bare_machine / file).parent.mkdir(parents=True, exist_ok=True)
        (bare_machine / file).write_text("{}")
    (bare_machine / "openpi/openpi-assets/checkpoints/pi05_base/params").mkdir(parents=True)
    resolved = resolve(Request(preset="libero10"))
    assert missing(resolved) == []
    assert str(resolved.preset.data.annotations).endswith("libero-10-r/cot_simple.json")


def test_resume_refuses_what_would_change_the_run() -> None:
    stored = resolve(Request(preset="libero10", weights="none", model="tiny", steps=200)).preset
    assert conflicts(Request(), stored) == []
    assert conflicts(Request(preset="libero10", model="tiny", steps=200, save_every=7, workers=3), stored) == []
    clash = conflicts(Request(steps=300, seed=1, freeze="none"), stored)
    assert clash == ["--steps 300 (the run has 200)", "--freeze none (the run has llm)", "--seed 1 (the run has 42)"]
    assert conflicts(Request(more_data=("b",)), stored) == ["--more-data with 1 sets (the run has 0)"]


def test_resume_may_change_intervals_and_places() -> None:
    changed = continued(Request(data="/elsewhere", save_every=7, workers=2), LIBERO10)
    assert (changed.data.data, changed.data.workers, changed.train.save_every) == ("/elsewhere", 2, 7)
    assert dataclasses.replace(changed.train, save_every=LIBERO10.train.save_every) == LIBERO10.train


def test_every_set_that_is_not_there_is_named(bare_machine: Path) -> None:
    (bare_machine / "a/meta").mkdir(parents=True)
    (bare_machine / "a/meta/info.json").touch()
    data, annotations, *_ = missing(resolve(Request("libero10", data="a", more_data=("b", "c"))))
    for name in "bc":
        assert f"{bare_machine / name} is not a LeRobot folder" in data
    assert f"{bare_machine / 'a'} is not" not in data
    assert all(f"{bare_machine / name / 'cot_simple.json'}" in annotations for name in "abc")
