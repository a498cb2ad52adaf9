"""Read an openpi pi0.5 checkpoint into Pi0Fuse, show what it is made of, and run one forward pass.

    python experiments/load_pi05.py --weights gs://openpi-assets/checkpoints/pi05_base/params
    python experiments/load_pi05.py --weights /data/pi05_base --json report.json

Sizes are read off the checkpoint. Where it has no LoRA, the published recipe's adapters are put on, as training would.
Every leaf is accounted for; one that is missing, unexpected, misshapen or damaged is an error that names it.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fusevla.presets import PI05, TINY, ExpertConfig, Freeze, LoraConfig, ModelConfig

if TYPE_CHECKING:
    from fusevla.arrays import Observation
    from fusevla.model.fuse import Pi0Fuse

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Args:
    """What to load, and how."""

    weights: str
    """A `params` folder, its parent, or a URL (gs:// needs gcsfs; fetched once)."""
    dtype: Literal["bfloat16", "float32", "training"] = "bfloat16"
    """Of all leaves; `training` keeps trainable leaves in float32 and frozen ones in bfloat16."""
    model: Literal["auto", "full", "tiny"] = "auto"
    """`auto` takes the sizes from the checkpoint; the others insist on a preset's."""
    lora: bool = True
    """Put the recipe's adapters (rank 16 and 32; at most a quarter of the width) on experts that come without."""
    freeze: Freeze = "llm"
    """What the table calls frozen."""
    ignore_extra: bool = False
    """Let leaves pass that the model has no place for."""
    json: Path | None = None
    """Write all figures to this file as well."""
    forward: bool = True
    """Run one forward pass (two cameras, 64 text tokens, one flow draw)."""


def choose_config(args: Args) -> ModelConfig:
    """The sizes asked for, with adapters where the checkpoint or ``--lora`` has them."""
    from fusevla.model.openpi import CheckpointError, read_metadata
    from fusevla.model.openpi_names import infer_config

    stored = read_metadata(args.weights)
    try:
        found = infer_config({path: leaf.shape for path, leaf in stored.items()})
    except (KeyError, ValueError) as error:
        if args.model == "auto":
            message = f"{args.weights}: sizes cannot be told from it ({error}); choose --model full or tiny"
            raise CheckpointError(message) from error
        found = PI05
    sizes = {"auto": found, "full": PI05, "tiny": TINY}[args.model]
    return dataclasses.replace(
        sizes,
        language=_adapted(args, sizes.language, found.language.lora, PI05.language.lora),
        action=_adapted(args, sizes.action, found.action.lora, PI05.action.lora),
        dtype="float32" if args.dtype == "float32" else "bfloat16",
        remat="none",
    )


def _adapted(args: Args, expert: ExpertConfig, found: LoraConfig | None, recipe: LoraConfig | None) -> ExpertConfig:
    """The expert with the adapters that the checkpoint has, else the recipe's if asked for."""
    rank = min(recipe.rank, expert.width // 4) if recipe and args.lora else 0
    return dataclasses.replace(expert, lora=found or (LoraConfig(rank, float(rank)) if rank else None))


def load(args: Args, config: ModelConfig) -> "Pi0Fuse":
    """The model, in the dtypes asked for."""
    import jax.numpy as jnp

    from fusevla.model.fuse import abstract
    from fusevla.model.openpi import load_params
    from fusevla.train.freeze import dtype_spec

    dtype = dtype_spec(abstract(config), args.freeze) if args.dtype == "training" else jnp.dtype(args.dtype)
    return load_params(args.weights, config, dtype, ignore_extra=args.ignore_extra)


def parameter_table(model: "Pi0Fuse", freeze: Freeze) -> list[dict[str, Any]]:
    """A row for each group, dtype and fate: group, leaves, parameters, bytes, dtype, trainable."""
    from fusevla.model.openpi_names import leaves_by_name
    from fusevla.train.freeze import trainable_spec

    trains = leaves_by_name(trainable_spec(model, freeze))
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for name, leaf in leaves_by_name(model).items():
        key = (_group(name), str(leaf.dtype), bool(trains[name]))
        row = rows.setdefault(
            key, {"group": key[0], "leaves": 0, "parameters": 0, "bytes": 0, "dtype": key[1], "trainable": key[2]}
        )
        row["leaves"] += 1
        row["parameters"] += leaf.size
        row["bytes"] += leaf.nbytes
    return list(rows.values())


def _group(name: str) -> str:
    part = name.split(".")[0]
    groups = {"vision": "image tower", "embedder": "embedder", "language": "language expert", "action": "action expert"}
    return groups.get(part, "action heads") + (" LoRA" if ".adapter." in name else "")


def random_inputs(config: ModelConfig) -> tuple["Observation", Any, Any]:
    """(observation, noisy actions, flow time) of one sample: two cameras, 64 tokens, one flow draw."""
    import numpy as np

    from fusevla.arrays import Observation

    rng, size, cameras = np.random.default_rng(0), config.vision.image_size, ("base_0_rgb", "left_wrist_0_rgb")
    observation = Observation(
        images={name: rng.integers(0, 256, (1, size, size, 3), np.uint8) for name in cameras},
        image_masks={name: np.ones(1, bool) for name in cameras},
        state=np.zeros((1, config.action_dim), np.float32),
        tokens=rng.integers(0, config.vocab_size, (1, 64), np.int32),
        token_mask=np.ones((1, 64), bool),
        token_ar_mask=np.zeros((1, 64), bool),
    )
    noisy = rng.standard_normal((1, 1, config.action_horizon, config.action_dim), np.float32)
    return observation, noisy, np.full((1, 1), 0.5, np.float32)


def forward_pass(model: "Pi0Fuse") -> dict[str, float]:
    """One pass over random inputs: seconds to compile, seconds to run, and whether every output is finite."""
    import jax
    import jax.numpy as jnp

    from fusevla.model.fuse import forward

    inputs = random_inputs(model.config)
    started = time.perf_counter()
    compiled = jax.jit(forward).lower(model, *inputs).compile()
    compile_seconds, started = time.perf_counter() - started, time.perf_counter()
    outputs = jax.block_until_ready(compiled(model, *inputs))
    seconds = time.perf_counter() - started
    finite = all(bool(jnp.isfinite(output).all()) for output in outputs)
    return {"compile_seconds": compile_seconds, "seconds": seconds, "finite": finite}


def peak_host_bytes() -> int:
    """The most resident memory that this process has had."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        peak = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peak:
            return int(peak[0].split()[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def memory() -> dict[str, int]:
    """Peak bytes so far, on the host and on the device where that keeps count."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    peaks = {"peak_host_bytes": peak_host_bytes()}
    return peaks | ({"peak_device_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})


def show(report: dict[str, Any]) -> None:
    """Prints the table, and what was read, made and passed over."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['weights']}\n{report['parameters']:,} parameters")
    table.add_column("group")
    for column in ("leaves", "parameters", "MiB"):
        table.add_column(column, justify="right")
    table.add_column("dtype")
    table.add_column("")
    for row in report["groups"]:
        numbers = (str(row["leaves"]), f"{row['parameters']:,}", f"{row['bytes'] / 2**20:,.1f}")
        table.add_row(row["group"], *numbers, row["dtype"], "trainable" if row["trainable"] else "frozen")
    Console().print(table)
    print(f"{report['trainable']:,} trainable, {report['frozen']:,} frozen (freeze={report['freeze']})")
    print(f"read from the checkpoint: {report['read']['leaves']} leaves, {report['read']['parameters']:,} parameters")
    if report["fresh_lora"]:
        print(f"LoRA initialised, not read: {' and '.join(report['fresh_lora'])} expert")
    if report["passed_over"]:
        print(f"passed over (--ignore-extra): {', '.join(report['passed_over'])}")
    print(f"loaded in {report['load_seconds']:.1f} s; {_peaks(report['memory_after_load'])}")


def _peaks(memory: dict[str, int]) -> str:
    names = {"peak_host_bytes": "peak host memory", "peak_device_bytes": "peak device memory"}
    return ", ".join(f"{names[key]} {value / GIB:.2f} GiB" for key, value in memory.items())


def run(args: Args) -> dict[str, Any]:
    """Everything; returns the figures."""
    from fusevla.compile_cache import use_compile_cache
    from fusevla.model.openpi import make_plan

    config = choose_config(args)
    plan = make_plan(args.weights, config, ignore_extra=args.ignore_extra)
    started = time.perf_counter()
    model = load(args, config)
    seconds = time.perf_counter() - started
    groups = parameter_table(model, args.freeze)
    count = {fate: sum(row["parameters"] for row in groups if row["trainable"] == fate) for fate in (True, False)}
    report: dict[str, Any] = {
        "weights": str(plan.folder),
        "parameters": count[True] + count[False],
        "trainable": count[True],
        "frozen": count[False],
        "freeze": args.freeze,
        "groups": groups,
        "read": {"leaves": len(plan.entries), "parameters": sum(entry.size for entry in plan.entries.values())},
        "fresh_lora": list(plan.fresh),
        "passed_over": list(plan.extra),
        "load_seconds": seconds,
        "memory_after_load": memory(),
        "config": dataclasses.asdict(config),
    }
    show(report)
    if args.forward:
        use_compile_cache()
        report["forward"] = forward_pass(model)
        report["memory_after_forward"] = memory()
        figures = report["forward"]
        print(
            f"forward pass: {figures['seconds']:.2f} s after {figures['compile_seconds']:.1f} s of compiling, "
            f"{'finite' if figures['finite'] else 'NOT FINITE'}; {_peaks(report['memory_after_forward'])}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    from fusevla.model.openpi import CheckpointError

    try:
        run(args)
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
