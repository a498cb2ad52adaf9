"""What the user asks for, worked out into a complete preset, and everything that is missing for it. Imports nothing heavy."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from fusevla.presets import PI05, PRESETS, TINY, Freeze, ModelConfig, Preset, ScheduleConfig, scratch_schedule

TOY = "toy"
TOY_BASE = Path(__file__).parents[1] / "assets" / "toy_base"
"""The toy's base weights (``params``), tokenizer and statistics, part of the package."""
BASE_URL = "gs://openpi-assets/checkpoints/pi05_base/params"
TOKENIZER_URL = "gs://big_vision/paligemma_tokenizer.model"
NONE = "none"


class RequestError(ValueError):
    """A request that cannot be met as it stands."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a preset's data come from, and where they are looked for when no path is given."""

    dataset: str
    annotations: str
    folder: str
    gigabytes: int


PUBLISHED = {
    "libero10": Published("yilin-wu/libero-10", "libero-10-r", "libero-10", 4),
    "libero100": Published("yilin-wu/libero-100", "libero-100-r", "libero-100", 40),
    "libero100-basket": Published("yilin-wu/libero-100", "libero-100-basket-r", "libero-100", 40),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A preset and what to change in it; None leaves the preset's value (or, on resume, the run's)."""

    preset: str | None = None
    data: str | None = None
    annotations: str | None = None
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
    flow_draws: int | None = None
    ema: float | None = None
    norm: str | None = None
    held_out: float | None = None
    seed: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    keep: int | None = None
    workers: int | None = None


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
    config = base if request.model is None else {"tiny": TINY, "full": PI05}[request.model]
    keep_lora = request.lora if request.lora is not None else not scratch
    if keep_lora:
        return config
    language, action = (dataclasses.replace(expert, lora=None) for expert in (config.language, config.action))
    return dataclasses.replace(config, language=language, action=action)


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


def _first_there(candidates: Iterable[Path]) -> str | None:
    return next((str(path.absolute()) for path in candidates if path.exists()), None)


def cache_folder() -> Path:
    """``$FUSEVLA_CACHE``, by default ``~/.cache/fusevla``."""
    return Path(os.environ.get("FUSEVLA_CACHE", "~/.cache/fusevla")).expanduser()


def default_data(name: str) -> tuple[str | None, str | None]:
    """(set, annotations) of a published preset where they lie under ``data/``; the toy's place, made on first use."""
    if name == TOY:
        return str((cache_folder() / "toy-plans").absolute()), None
    published = PUBLISHED.get(name)
    if published is None:
        return None, None
    folder = _first_there([Path("data") / published.folder])
    inside = [Path("data") / published.annotations / "cot_simple.json"]
    return folder, _first_there(
        inside if name.endswith("basket") else [*inside, Path("data") / published.folder / "cot_simple.json"]
    )


def default_weights(name: str) -> str | None:
    """The toy's own base, or the published base weights where they lie in a cache."""
    if name == TOY:
        return str(TOY_BASE / "params")
    own = cache_folder() / "gs"
    openpi = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    below = Path("openpi-assets") / "checkpoints" / "pi05_base" / "params"
    return _first_there([own / below, openpi / below])


def default_tokenizer(name: str, scratch: bool) -> str:
    """The toy's own, ``train`` from scratch, or PaliGemma's where it lies in a cache ("" where it does not)."""
    if name == TOY:
        return str(TOY_BASE / "tokenizer.model")
    if scratch:
        return "train"
    openpi = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser() / "big_vision"
    return _first_there(folder / "paligemma_tokenizer.model" for folder in (cache_folder(), openpi)) or ""


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
        for name in ("batch", "steps", "flow_draws", "save_every", "log_every", "keep")
        if (value := getattr(request, name)) is not None and value < 1
    ]
    if problems:
        raise RequestError("; ".join(problems))
    folder, annotations = default_data(base.name)
    data = _replaced(
        base.data,
        data=_absolute(request.data) or base.data.data or folder,
        annotations=_absolute(request.annotations) or (annotations if request.data is None else None),
        norm=request.norm if request.norm in (None, "auto", NONE) else _absolute(request.norm),
        held_out_fraction=request.held_out,
        workers=request.workers,
    )
    train = _replaced(
        base.train,
        steps=steps,
        batch_size=request.batch,
        schedule=_schedule(base, request, steps, scratch),
        freeze=request.freeze,
        flow_draws=request.flow_draws,
        ema_decay=request.ema,
        seed=request.seed,
        save_every=request.save_every,
        log_every=request.log_every,
        keep_checkpoints=request.keep,
    )
    weights = None if scratch else (request.weights or default_weights(base.name))
    tokenizer = request.tokenizer or default_tokenizer(base.name, scratch)
    preset = dataclasses.replace(base, model=_model(base.model, request, scratch), data=data, train=train)
    return Resolved(preset, weights, tokenizer, scratch)


def missing(resolved: Resolved) -> list[str]:
    """Everything that the run needs and that is not there, each with how to get it."""
    preset = resolved.preset
    checks: list[Callable[[], str | None]] = [lambda: _missing_data(preset), lambda: _missing_annotations(preset)]
    checks += [lambda: _missing_weights(resolved), lambda: _missing_tokenizer(resolved)]
    return [problem for check in checks if (problem := check()) is not None]


def _download(preset: Preset) -> str:
    published = PUBLISHED.get(preset.name)
    if published is None:
        return "give a LeRobot folder with --data"
    return (
        f"pip install huggingface_hub, then\n"
        f"      hf download {published.dataset} --repo-type dataset --local-dir data/{published.folder}\n"
        f"    (about {published.gigabytes} GB; found there without a flag), or give any LeRobot folder with --data DIR"
    )


def _missing_data(preset: Preset) -> str | None:
    folder = preset.data.data
    if folder is not None and (Path(folder) / "meta" / "info.json").is_file():
        return None
    where = "no --data was given" if folder is None else f"{folder} is not a LeRobot folder (no meta/info.json)"
    return f"data: {where}.\n    {_download(preset)}"


def _missing_annotations(preset: Preset) -> str | None:
    data = preset.data
    if not data.use_reasoning:
        return None
    inside = [] if data.data is None else [Path(data.data) / "cot_simple.json"]
    candidates = [Path(data.annotations)] if data.annotations is not None else inside
    if any(path.is_file() for path in candidates):
        return None
    published = PUBLISHED.get(preset.name)
    looked = f"looked for {candidates[0]}" if candidates else "they usually lie inside the set"
    if published is None:
        return f"reasoning annotations: cot_simple.json is not there ({looked}); give it with --annotations FILE."
    return (
        f"reasoning annotations ({published.annotations}/cot_simple.json): not there ({looked}).\n"
        f"    hf download nvidia/libero-r-datasets --repo-type dataset --include '{published.annotations}/*' --local-dir data\n"
        f"    or give the file with --annotations FILE"
    )


def _missing_weights(resolved: Resolved) -> str | None:
    weights = resolved.weights
    if resolved.from_scratch or (weights is not None and "://" in weights):
        return None
    if weights is None:
        return (
            f"base weights (pi05_base, 13 GB, public): not in a cache.\n"
            f"    pip install gcsfs, then --weights {BASE_URL} (fetched once),\n"
            f"    or give a local copy with --weights DIR, or train from scratch with --weights none (--model tiny for a laptop)"
        )
    if Path(weights).expanduser().exists():
        return None
    return f"base weights: there is nothing at {weights}; give an openpi checkpoint with --weights DIR, or --weights none"


def _missing_tokenizer(resolved: Resolved) -> str | None:
    choice = resolved.tokenizer
    if choice == "train" or (choice and Path(choice).expanduser().is_file()):
        return None
    where = f"there is no file {choice}" if choice else "not in a cache"
    return (
        f"PaliGemma tokenizer (4 MB, public): {where}.\n"
        f"    fetch {TOKENIZER_URL} and give it with --tokenizer PATH\n"
        f"    (from scratch, a small one is trained on the set's own text)"
    )


def describe(resolved: Resolved, out: Path) -> str:
    """What the run would do, in a few lines."""
    preset, train = resolved.preset, resolved.preset.train
    published = PUBLISHED.get(preset.name)
    source = preset.data.data or (f"{published.dataset} with {published.annotations}" if published else "the set")
    schedule = train.schedule
    origin = "random weights" if resolved.from_scratch else (resolved.weights or "the published pi05_base weights")
    size = preset.model.language.width
    adapters = [expert.lora.rank for expert in (preset.model.language, preset.model.action) if expert.lora]
    lora = f"LoRA of rank {' and '.join(map(str, adapters))}" if adapters else "no LoRA"
    return (
        f"preset {preset.name}: trains Pi0Fuse (language width {size}, {lora}, freeze={train.freeze}) from {origin}\n"
        f"  on {source}\n"
        f"  for {train.steps} steps of {train.batch_size} samples; learning rate warms up over {schedule.warmup_steps} steps to "
        f"{schedule.peak:g}, cosine to {schedule.end:g}\n"
        f"  cameras {', '.join(preset.data.cameras)}; held-out episodes: {preset.data.held_out_fraction:.0%}\n"
        f"  writes {out}: metrics.jsonl, summary.json, pictures, and a checkpoint every {train.save_every} steps"
    )


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
        "flow_draws": train.flow_draws,
        "ema": train.ema_decay,
        "norm": data.norm,
        "held_out": data.held_out_fraction,
        "seed": train.seed,
    }
    given = {name: getattr(request, name) for name in current}
    if given["norm"] not in (None, "auto", NONE):
        given["norm"] = _absolute(given["norm"])
    return [
        f"--{name.replace('_', '-')} {given[name]} (the run has {value})"
        for name, value in current.items()
        if given[name] is not None and given[name] != value
    ]


def continued(request: Request, preset: Preset) -> Preset:
    """The stored preset of a run, with what may change on resume: where the data lie, intervals, workers."""
    data = _replaced(
        preset.data, data=_absolute(request.data), annotations=_absolute(request.annotations), workers=request.workers
    )
    train = _replaced(preset.train, save_every=request.save_every, log_every=request.log_every, keep_checkpoints=request.keep)
    return dataclasses.replace(preset, data=data, train=train)
