"""Which batch fits a GPU, and which flags make a larger one fit: from compiled memory, before any weight is loaded.

    python experiments/plan_memory.py --preset libero10 --gpu 24
    python experiments/plan_memory.py --preset libero10 --gpu 80 --batch 64 --freeze all_but_lora --json plan.json
    JAX_PLATFORMS=cpu python experiments/plan_memory.py --preset libero10 --gpu 24          # without touching a GPU

Flags are those of train.py. The training step is compiled for shapes of several batch sizes, a minute or more each at full size,
with the longest text that the published sets have. GB are 10^9 bytes. 95% of the GPU less 0.6 GB is counted on: the rest is for
the CUDA context, kernels' libraries and fragmentation. train.py has JAX take 95% of a GPU too, in place of its usual 75%, unless
XLA_PYTHON_CLIENT_MEM_FRACTION says something else.

A compiler plans for the backend that it compiles for: work space for a CPU may differ from that for a GPU, arguments do not.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fusevla.presets import PRESETS, Base, Freeze, Moments, Remat

if TYPE_CHECKING:
    from fusevla.presets import Preset
    from fusevla.train.memory import Memory
    from fusevla.train.plan import Measure


@dataclasses.dataclass(frozen=True)
class Args:
    """Plan the memory of training. A flag that is not given keeps the preset's value."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))]
    """The job."""
    gpu: Annotated[float, tyro.conf.arg(metavar="GB")]
    """Memory of one GPU."""
    devices: int = 1
    """GPUs that share a batch."""
    batch: int | None = None
    """Samples per step, over all devices."""
    model: Literal["full", "tiny"] | None = None
    """Model size; the preset's by default."""
    lora: bool | None = None
    """Low-rank adapters."""
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
    flow_draws: int | None = None
    """(noise, time) draws per sample that share one prefix pass."""
    ema: float | None = None
    """Keep an exponential moving average of the weights with this decay."""
    text_length: int | None = None
    """Tokens that texts are padded to; by default the bucket of the published sets' longest sample."""
    levers: bool = True
    """Try what else would save memory, one flag after the other."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures to this file as well."""


def make_preset(args: Args) -> "Preset":
    """The preset asked for. ValueError for what makes no run."""
    from fusevla.train.request import Request, resolve

    names = {field.name for field in dataclasses.fields(Request)}
    preset = resolve(Request(**{name: value for name, value in vars(args).items() if name in names})).preset
    unit, batch = args.devices * preset.train.accumulate, preset.train.batch_size
    if args.devices < 1 or (args.text_length is not None and args.text_length < 1):
        raise ValueError("--devices, --text-length: expected at least 1")
    if batch % unit:
        raise ValueError(
            f"--batch: expected a multiple of {unit} ({args.devices} devices x {preset.train.accumulate} parts), got {batch}"
        )
    return preset


def text_length(args: Args, preset: "Preset") -> int:
    """What texts are padded to."""
    from fusevla.data.batch import bucket_for
    from fusevla.evaluate.drawn_batches import LONGEST_PROMPT_AND_THOUGHT

    buckets = preset.data.text_buckets
    return args.text_length or bucket_for(min(sum(LONGEST_PROMPT_AND_THOUGHT), max(buckets)), buckets)


@contextmanager
def compilations(length: int, devices: int, expected: int) -> Iterator["Measure"]:
    """A function that gives a preset's memory, each compiled once, with progress and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fusevla.train.memory import GB, planned_memory

    known: dict[Preset, Memory] = {}
    console, began = Console(stderr=True), time.perf_counter()
    left = lambda: (time.perf_counter() - began) / max(len(known), 1) * max(expected - len(known), 0)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        line = bar.add_task("", total=expected)

        def measure(preset: "Preset") -> "Memory":
            if preset not in known:
                soon = f", about {left():.0f} s left" if known else ""
                bar.update(line, description=f"compiling {describe(preset)}{soon}", total=max(expected, len(known) + 1))
                known[preset] = planned_memory(preset, preset.train.batch_size, length, devices)
                bar.advance(line)
                text = f"{describe(preset)}: {known[preset].total / GB:.2f} GB"
                console.print(
                    text if console.is_terminal else f"{text}; about {left():.0f} s left", soft_wrap=True, highlight=False
                )
            return known[preset]

        yield measure


def describe(preset: "Preset") -> str:
    """A plan in a line."""
    train = preset.train
    stored = f"base {train.base}, moments {train.moments}, freeze {train.freeze}"
    return f"batch {train.batch_size}, accumulate {train.accumulate}, remat {preset.model.remat}, {stored}"


def run(args: Args) -> dict[str, Any]:
    """Everything; returns the figures."""
    from fusevla.train.levers import divisors, levers
    from fusevla.train.memory import usable_bytes
    from fusevla.train.plan import try_levers, try_sizes, try_together

    preset, limit = make_preset(args), usable_bytes(args.gpu)
    length, batch, together = text_length(args, preset), preset.train.batch_size, None
    one_part_count = divisors(batch // args.devices, preset.train.accumulate)[:1]
    expected = 4 + (len(levers(preset, one_part_count)) if args.levers else 0)
    with compilations(length, args.devices, expected) as measure:
        largest, sizes = try_sizes(preset, measure, limit, args.devices)
        tried = try_levers(preset, measure, limit, largest, args.devices) if args.levers else []
        if all(memory.total > limit for memory in (sizes[batch], *(memory for _, memory in tried))):
            together = try_together(preset, measure, limit, tried)
    return {
        **asked(args, preset, length),
        "usable_bytes": limit,
        "fits": sizes[batch].total <= limit,
        "largest_batch": largest,
        "batches": [{"batch": size, **plan(memory, limit)} for size, memory in sizes.items()],
        "levers": [{"flags": [lever.flag], "costs": lever.costs, **plan(memory, limit)} for lever, memory in tried],
        "together": together and {"flags": [lever.flag for lever in together[0]], **plan(together[1], limit)},
    }


def plan(memory: "Memory", limit: int) -> dict[str, Any]:
    """Figures of one plan."""
    return {**dataclasses.asdict(memory), "total_bytes": memory.total, "fits": memory.total <= limit}


def asked(args: Args, preset: "Preset", length: int) -> dict[str, Any]:
    """What was planned, where and with what."""
    import jax

    from fusevla.evaluate.machine import versions

    train = preset.train
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "gpu_bytes": int(args.gpu * 1e9),
        "devices": args.devices,
        "preset": preset.name,
        "batch": train.batch_size,
        "text_length": length,
        "cameras": list(preset.data.cameras),
        **{name: getattr(train, name) for name in ("freeze", "base", "moments", "accumulate", "flow_draws")},
        "remat": preset.model.remat,
        "ema": train.ema_decay,
    }


def show(figures: Mapping[str, Any]) -> None:
    """Prints the table, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    kept = ", ".join(f"{name} {figures[name]}" for name in ("freeze", "base", "moments", "accumulate", "remat"))
    title = f"{figures['preset']}: {kept}; text of {figures['text_length']}, {len(figures['cameras'])} cameras\nGB on each GPU"
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("arguments", "work", "sum", f"of {figures['usable_bytes'] / 1e9:.2f}"):
        table.add_column(column, justify="right")
    table.add_column("what it costs")
    for size in figures["batches"]:
        table.add_row(f"batch {size['batch']}", *_cells(size), "")
    if figures["levers"]:
        table.add_section()
        table.add_row(f"batch {figures['batch']} with", *4 * [""], "")
    for lever in [*figures["levers"], *filter(None, [figures["together"]])]:
        table.add_row("\n".join(lever["flags"]), *_cells(lever), lever.get("costs", ""))
    Console().print(table)
    print("\n".join(conclusions(figures)))


def _cells(plan: Mapping[str, Any]) -> list[str]:
    parts = (plan["argument_bytes"], plan["temp_bytes"] + plan["output_bytes"], plan["total_bytes"])
    return [*(f"{part / 1e9:.2f}" for part in parts), "fits" if plan["fits"] else "too much"]


def conclusions(figures: Mapping[str, Any]) -> list[str]:
    """The answer in words."""
    batch, largest = figures["batch"], figures["largest_batch"]
    lines = [
        f"batch {batch} {'fits' if figures['fits'] else 'does not fit'}; the largest that fits is {largest or 'none at all'}"
    ]
    if figures["levers"] and not figures["fits"]:
        choices = [*figures["levers"], *filter(None, [figures["together"]])]
        enough = "; or ".join(" ".join(choice["flags"]) for choice in choices if choice["fits"])
        lines.append(
            f"batch {batch} fits with {enough}" if enough else f"batch {batch} fits with none of these flags, nor with all"
        )
    return [
        *lines,
        f"counted on {figures['usable_bytes'] / 1e9:.2f} of {figures['gpu_bytes'] / 1e9:g} GB: 95% less 0.6 GB "
        "(train.py lets JAX take 95%)",
        f"compiled for {figures['backend']} ({figures['device']})"
        + ("; a GPU's compiler may need more work space, or less" if figures["backend"] == "cpu" else ""),
    ]


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    from fusevla.evaluate.bench import publish

    publish(lambda: run(args), show, args.json)


if __name__ == "__main__":
    main()
