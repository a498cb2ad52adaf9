"""What a run needs and does not have, each with how to get it, and what the run would do."""

from collections.abc import Callable
from pathlib import Path

from fusevla.presets import Preset
from fusevla.tokens.ids import PALIGEMMA_SOURCE
from fusevla.tokens.tokenizer import paligemma_tokenizer_path
from fusevla.train.request import BASE_URL, PUBLISHED, Resolved


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
        f"hf download {published.dataset} --repo-type dataset --local-dir data/{published.folder}\n"
        f"    (found there without a flag), or give any LeRobot folder with --data DIR"
    )


def _missing_data(preset: Preset) -> str | None:
    sets = preset.data.sets
    absent = [folder for folder, _ in sets if not (Path(folder) / "meta" / "info.json").is_file()]
    if sets and not absent:
        return None
    where = "; ".join(f"{folder} is not a LeRobot folder (no meta/info.json)" for folder in absent) or "no --data was given"
    return f"data: {where}.\n    {_download(preset)}"


def _missing_annotations(preset: Preset) -> str | None:
    data = preset.data
    if not data.use_reasoning:
        return None
    absent = [file for _, file in data.sets if not Path(file).is_file()]
    if data.sets and not absent:
        return None
    published = PUBLISHED.get(preset.name)
    looked = f"looked for {', '.join(absent)}" if absent else "they usually lie inside the set"
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
    """A fetch is tried right here, where nothing is in a cache: it takes seconds, and the list must be complete."""
    choice = resolved.tokenizer
    if choice == "train" or Path(choice).expanduser().is_file():
        return None
    if choice != PALIGEMMA_SOURCE:
        return f"tokenizer: there is no file {choice}; give a SentencePiece model with --tokenizer PATH, or --tokenizer train"
    try:
        paligemma_tokenizer_path()
    except (FileNotFoundError, ValueError) as error:
        return f"{error}\n    (from scratch, a small one is trained on the set's own text)"
    return None


def describe(resolved: Resolved, out: Path) -> str:
    """What the run would do, in a few lines."""
    preset, train = resolved.preset, resolved.preset.train
    published = PUBLISHED.get(preset.name)
    published_set = f"{published.dataset} with {published.annotations}" if published else "the set"
    source = " and ".join(folder for folder, _ in preset.data.sets) or published_set
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
