"""Fine-tune Pi0Fuse on LIBERO-like demonstrations with reasoning annotations, or train it from scratch.

    python experiments/train.py --preset libero10
    python experiments/train.py --preset libero10 --model tiny --weights none --data DIR --steps 200 --out runs/try
    python experiments/train.py --out runs/try --resume

The output folder gets metrics.jsonl, validation.jsonl, summary.json, losses.png, batch.png and checkpoints/. It is never
overwritten: --resume continues the run in it with exactly the losses of an uninterrupted one.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fusevla.presets import PRESETS, Attention, Base, Freeze, Moments, Remat
from fusevla.train.missing import describe, missing
from fusevla.train.request import TOY, Request, RequestError, resolve


@dataclasses.dataclass(frozen=True)
class Args:
    """Train Pi0Fuse. A flag that is not given keeps the preset's value."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="|".join(PRESETS))] = None
    """The job (needed unless --resume)."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A LeRobot folder (v2.0, v2.1 or v3.0)."""
    annotations: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Reasoning annotations; by default cot_simple.json inside the data."""
    more_data: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="DIR")] = None
    """Further sets to mix in, each with its cot_simple.json inside."""
    data_weights: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="WEIGHT")] = None
    """How often samples of each set are drawn, --data first (3 1: three of four from it); by default every frame as often."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="DIR|none")] = None
    """Base weights in openpi's layout (folder or gs:// URL); none trains everything from random weights."""
    model: Literal["full", "tiny"] | None = None
    """Model size; the preset's by default."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH|train")] = None
    """A SentencePiece model; train makes a small one from the set's text (the default with --weights none)."""
    lora: bool | None = None
    """Low-rank adapters; off by default with --weights none, else as the preset says."""
    batch: int | None = None
    """Samples per step, over all devices."""
    steps: int | None = None
    """Optimisation steps; also the length of the learning rate's decay."""
    learning_rate: float | None = None
    """Peak learning rate; it decays to a tenth."""
    freeze: Freeze | None = None
    """llm: LoRA, image tower and action heads train; all_but_lora: only LoRA and heads; none: everything."""
    base: Base | None = None
    """How frozen matrices are stored: int8 and nf4 take a half and a quarter of bf16's memory, and round them."""
    moments: Moments | None = None
    """How the optimizer keeps its moments of the image tower, where that trains."""
    accumulate: int | None = None
    """Divide each batch into so many parts that take turns in memory; the gradient stays that of the whole batch."""
    remat: Remat | None = None
    """What the backward pass computes again rather than keeps: nothing, all but matrix products, everything."""
    attention: Attention | None = None
    """Which attention kernel; auto: what suits the device, once it has been checked against plain."""
    flow_draws: int | None = None
    """(noise, time) draws per sample that share one prefix pass."""
    ema: float | None = None
    """Keep an exponential moving average of the weights with this decay."""
    norm: Annotated[str | None, tyro.conf.arg(metavar="auto|none|PATH")] = None
    """Statistics: the folder's norm_stats.json, computed where absent (auto); raw values (none); or a file."""
    held_out: float | None = None
    """Share of the episodes kept for validation."""
    seed: int | None = None
    """Of weights, data order and noise."""
    save_every: int | None = None
    """Steps between checkpoints."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl."""
    keep: int | None = None
    """Checkpoints kept."""
    workers: int | None = None
    """Processes that prepare samples; 0 uses threads. Changes no result."""
    frame_cache: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep decoded frames in this folder of a fast disk (300 kB per frame of two cameras); changes no result."""
    validate_every: int | None = None
    """Steps between held-out losses; by default only before and after training."""
    eval_samples: int = 64
    """Held-out reasoning samples, and as many acting ones, for the final figures; 0 leaves them out."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder; runs/PRESET by default."""
    resume: bool = False
    """Continue the run in the output folder from its latest complete checkpoint."""

    def request(self) -> Request:
        """The flags that describe the run itself."""
        names = {field.name for field in dataclasses.fields(Request)}
        return Request(**{name: value for name, value in vars(self).items() if name in names})


def output_folder(args: Args) -> Path:
    """Where the run goes. Raises ``RequestError`` rather than overwrite, or where there is nothing to resume."""
    if args.out is None and args.preset is None:
        raise RequestError(f"--preset is needed: one of {', '.join(PRESETS)} (or --resume with --out)")
    out = Path(args.out or f"runs/{args.preset}").expanduser().absolute()
    if args.resume and not (out / "checkpoints").is_dir():
        raise RequestError(f"--resume: {out} holds no checkpoints; start a run without --resume, or name another --out")
    if not args.resume and args.preset is None:
        raise RequestError(f"--preset is needed for a new run: one of {', '.join(PRESETS)}")
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists and is not empty: continue it with --resume, name another --out, or remove it")
    return out


def main() -> None:
    """Parses the flags, then trains."""
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU; JAX would leave a quarter of it unused
    try:
        out = output_folder(args)
        run(args, out)
    except Exception as error:
        if not _is_expected(error):
            raise
        sys.exit(f"error: {error}")


def run(args: Args, out: Path) -> None:
    """A new run, or one continued."""
    from fusevla.compile_cache import use_compile_cache

    request = args.request()
    if args.resume:
        from fusevla.begin import resume_run
        from fusevla.run import Options

        use_compile_cache()
        resume_run(request, out, Options(args.eval_samples, args.validate_every)).execute()
        return
    resolved = resolve(request)
    if resolved.preset.name == TOY and args.data is None:
        from fusevla.train.material import make_toy_set

        make_toy_set(Path(str(resolved.preset.data.data)))
    absent = missing(resolved)
    if absent:
        needs = "\n\n  ".join(absent)
        raise RequestError(f"this run needs what is not at hand:\n\n  {needs}\n\nWith it:\n  {describe(resolved, out)}")
    print(describe(resolved, out), flush=True)
    from fusevla.begin import new_run
    from fusevla.run import Options

    use_compile_cache()
    new_run(resolved, out, Options(args.eval_samples, args.validate_every)).execute()


def _is_expected(error: Exception) -> bool:
    """Whether the message alone says what to do."""
    if isinstance(error, RequestError):
        return True
    from fusevla.run import EXPECTED

    return isinstance(error, EXPECTED)


if __name__ == "__main__":
    main()
