"""What the user asks for, worked out into a complete preset. Imports nothing heavy."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from fusevla.files import cache_folder, openpi_cache_folder
from fusevla.presets import (
    FULL,
    PI05,
    PRESETS,
    TINY,
    Attention,
    Base,
    Freeze,
    ModelConfig,
    Moments,
    Preset,
    Remat,
    ScheduleConfig,
    scratch_schedule,
    without_lora,
)
from fusevla.tokens.ids import PALIGEMMA_SOURCE

TOY = "toy"
TOY_BASE = Path(__file__).parents[1] / "assets" / "toy_base"
"""The toy's base weights (``params``), tokenizer and statistics, part of the package."""
BASE_URL = "gs://openpi-assets/checkpoints/pi05_base/params"
NONE = "none"


class RequestError(ValueError):
    """A request that cannot be met as it stands."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a preset's data come from, and where they are looked for when no path is given."""

    dataset: str
    annotations: str
    folder: str


PUBLISHED = {
    "libero10": Published("yilin-wu/libero-10", "libero-10-r", "libero-10"),
    "libero100": Published("yilin-wu/libero-100", "libero-100-r", "libero-100"),
    "libero100-basket": Published("yilin-wu/libero-100", "libero-100-basket-r", "libero-100"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A preset and what to change in it; None leaves the preset's value (or, on resume, the run's)."""

    preset: str | None = None
    data: str | None = None
    annotations: str | None = None
    more_data: tuple[str, ...] | None = None
    data_weights: tuple[float, ...] | None = None
    weights: str | None = None
    """A checkpoint, ``none`` for random weights, or None for the preset's."""
    model: Literal["full", "tiny"] | None = None
    tokenizer: str | None = None
    """A ``.model`` file, ``train``, or None: ``train`` from scratch, else PaliGemma's."""
    lora: bool | None = None
    batch: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    freeze: Freeze | None = None
    base: Base | None = None
    moments: Moments | None = None
    accumulate: int | None = None
    remat: Remat | None = None
    attention: Attention | None = None
    flow_draws: int | None = None
    ema: float | None = None
    norm: str | None = None
    held_out: float | None = None
    seed: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    keep: int | None = None
    workers: int | None = None
    frame_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A request worked out: ``weights`` and ``tokenizer`` are paths, ``None`` (random) and ``train``, or not at hand."""

    preset: Preset
    weights: str | None
    tokenizer: str
    from_scratch: bool


def _replaced(config: Any, **changes: Any) -> Any:
    """``config`` with those changes that are not None."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def _model(base: ModelConfig, request: Request, scratch: bool) -> ModelConfig:
    config = base if request.model is None else {"tiny": TINY, "full": FULL}[request.model]
    keep_lora = request.lora if request.lora is not None else not scratch
    config = _replaced(config, remat=request.remat, attention=request.attention)
    return config if keep_lora else without_lora(config)


def _schedule(base: Preset, request: Request, steps: int, scratch: bool) -> ScheduleConfig:
    schedule = base.train.schedule
    if scratch:
        schedule = scratch_schedule(steps)
    elif request.steps is not None:
        warmup = min(schedule.warmup_steps, steps // 10)
        schedule = dataclasses.replace(schedule, warmup_steps=warmup, decay_steps=steps)
    if request.learning_rate is not None:
        schedule = dataclasses.replace(schedule, peak=request.learning_rate, end=request.learning_rate / 10)
    return schedule


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _all_absolute(paths: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if paths is None else tuple(str(_absolute(path)) for path in paths)


def _first_there(candidates: Iterable[Path]) -> str | None:
    return next((str(path.absolute()) for path in candidates if path.exists()), None)


def default_data(name: str) -> tuple[str | None, str | None]:
    """(set, annotations) of a published preset where they lie under ``data/``; the toy's place, made on first use."""
    if name == TOY:
        return str((cache_folder() / f"toy-plans-{_toy_version()}").absolute()), None
    published = PUBLISHED.get(name)
    if published is None:
        return None, None
    folder = _first_there([Path("data") / published.folder])
    inside = [Path("data") / published.annotations / "cot_simple.json"]
    return folder, _first_there(
        inside if name.endswith("basket") else [*inside, Path("data") / published.folder / "cot_simple.json"]
    )


def _toy_version() -> str:
    """Digest of the code that draws and writes the toy set: a set in the cache never outlives a change of its world."""
    folder = Path(__file__).parents[1] / "data"
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("toy_world.py", "toy.py")))
    return digest.hexdigest()[:12]


def default_weights(name: str) -> str | None:
    """The toy's own base, or the published base weights where they lie in a cache."""
    if name == TOY:
        return str(TOY_BASE / "params")
    own = cache_folder() / "gs"
    below = Path("openpi-assets") / "checkpoints" / "pi05_base" / "params"
    return _first_there([own / below, openpi_cache_folder() / below])


def default_tokenizer(name: str, scratch: bool) -> str:
    """The toy's own, ``train`` from scratch, or PaliGemma's (a URL: found in a cache, or fetched into one)."""
    if name == TOY:
        return str(TOY_BASE / "tokenizer.model")
    return "train" if scratch else PALIGEMMA_SOURCE


def resolve(request: Request, base: Preset | None = None) -> Resolved:
    """The complete preset. ``base`` overrides the named preset (with its own data and sizes).

    Raises ``RequestError`` for an unknown preset, or numbers that make no run.
    """
    if base is None:
        if request.preset not in PRESETS:
            raise RequestError(f"--preset: expected one of {', '.join(PRESETS)}; got {request.preset}")
        base = PRESETS[request.preset]
    scratch = request.weights == NONE
    steps = base.train.steps if request.steps is None else request.steps
    problems = [
        f"--{name.replace('_', '-')}: expected at least 1, got {value}"
        for name in ("batch", "steps", "accumulate", "flow_draws", "save_every", "log_every", "keep")
        if (value := getattr(request, name)) is not None and value < 1
    ]
    problems += _weight_problems(request)
    if problems:
        raise RequestError("; ".join(problems))
    folder, annotations = default_data(base.name)
    data = _replaced(
        base.data,
        data=_absolute(request.data) or base.data.data or folder,
        annotations=_absolute(request.annotations) or (annotations if request.data is None else None),
        more_data=_all_absolute(request.more_data),
        data_weights=request.data_weights,
        norm=request.norm if request.norm in (None, "auto", NONE) else _absolute(request.norm),
        held_out_fraction=request.held_out,
        workers=request.workers,
        frame_cache=_absolute(request.frame_cache),
    )
    train = _replaced(
        base.train,
        steps=steps,
        batch_size=request.batch,
        schedule=_schedule(base, request, steps, scratch),
        freeze=request.freeze,
        base=request.base,
        moments=request.moments,
        accumulate=request.accumulate,
        flow_draws=request.flow_draws,
        ema_decay=request.ema,
        seed=request.seed,
        save_every=request.save_every,
        log_every=request.log_every,
        keep_checkpoints=request.keep,
    )
    if train.batch_size % train.accumulate:
        raise RequestError(
            f"--accumulate: the batch's {train.batch_size} samples cannot be divided into {train.accumulate} equal parts; "
            f"take a --batch that is a multiple of {train.accumulate}, or a number that divides {train.batch_size}"
        )
    weights = None if scratch else (request.weights or default_weights(base.name))
    tokenizer = request.tokenizer or default_tokenizer(base.name, scratch)
    preset = dataclasses.replace(base, model=_model(base.model, request, scratch), data=data, train=train)
    return Resolved(preset, weights, tokenizer, scratch)


def _weight_problems(request: Request) -> list[str]:
    """Weights that are none, or not one for each set."""
    weights, sets = request.data_weights or (), 1 + len(request.more_data or ())
    if weights and len(weights) != sets:
        return [f"--data-weights: expected one number for each of the {sets} sets (--data, then --more-data), got {len(weights)}"]
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    return [f"--data-weights: expected positive numbers, got {bad}; leave out a set that is not wanted"] if bad else []


def conflicts(request: Request, preset: Preset) -> list[str]:
    """Flags that were given and differ from the run that is to be resumed: it continues exactly, or not at all."""
    train, data, model = preset.train, preset.data, preset.model
    tiny_or_full = "tiny" if model.vision == TINY.vision else "full" if model.vision == PI05.vision else None
    has_lora = model.language.lora is not None or model.action.lora is not None
    current = {
        "preset": preset.name,
        "model": tiny_or_full,
        "lora": has_lora,
        "batch": train.batch_size,
        "steps": train.steps,
        "learning_rate": train.schedule.peak,
        "freeze": train.freeze,
        "base": train.base,
        "moments": train.moments,
        "accumulate": train.accumulate,
        "remat": model.remat,
        "attention": model.attention,
        "flow_draws": train.flow_draws,
        "ema": train.ema_decay,
        "norm": data.norm,
        "data_weights": data.data_weights,
        "held_out": data.held_out_fraction,
        "seed": train.seed,
    }
    given = {name: getattr(request, name) for name in current}
    if given["norm"] not in (None, "auto", NONE):
        given["norm"] = _absolute(given["norm"])
    clash = [name for name, value in current.items() if given[name] is not None and given[name] != value]
    problems = [f"--{name.replace('_', '-')} {given[name]} (the run has {current[name]})" for name in clash]
    if request.more_data is not None and len(request.more_data) != len(data.more_data):
        problems.append(f"--more-data with {len(request.more_data)} sets (the run has {len(data.more_data)})")
    return problems


def continued(request: Request, preset: Preset) -> Preset:
    """The stored preset of a run, with what may change on resume: where the data lie, intervals, workers."""
    data = _replaced(
        preset.data,
        data=_absolute(request.data),
        annotations=_absolute(request.annotations),
        more_data=_all_absolute(request.more_data),
        workers=request.workers,
        frame_cache=_absolute(request.frame_cache),
    )
    train = _replaced(preset.train, save_every=request.save_every, log_every=request.log_every, keep_checkpoints=request.keep)
    return dataclasses.replace(preset, data=data, train=train)
