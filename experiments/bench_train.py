"""What a training step costs in time and memory, beside a step written as openpi writes it, in the same process.

    python experiments/bench_train.py --size medium --json medium.json                      # for a CPU
    python experiments/bench_train.py --size full --json full.json                          # for a GPU of 80 GB or more
    python experiments/bench_train.py --size full --compile-only --json compiled.json       # memory alone, anywhere

``full`` is the published model in bfloat16 (batch 16 unless told otherwise), ``medium`` a narrow one with the whole vocabulary
in float32 (batch 4), both with LoRA as in the preset libero10. The reference (fusevla.evaluate.reference_step) has a third
camera that is masked, text padded to 415 tokens, log-probabilities of every word at every text position, einsum attention over
the full mask, and recomputes every layer. Both sides start from the same weights and see the same samples: how far loss and
gradient norm of their first steps differ is among the figures.

Half of the samples reason, half act; their lengths are those of real ones (fusevla.evaluate.drawn_batches). Steps take turns,
since other work on the machine disturbs both sides; figures are medians, and the fastest step is given too. Memory is what the
compiler planned for the longest text among the batches; with --compile-only the longest of the whole set is among them. "flops"
counts the matrix products of a step by fusevla.evaluate.flops: the reference's with recomputation, ours without; utilisation is
ours per second over a measured matrix product in the compute dtype.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from fusevla.evaluate.bench_sides import Side
    from fusevla.presets import ModelConfig, Preset

BATCH_SIZE = {"medium": 4, "full": 16}
MATRIX = {"cpu": 2048}
"""Side of the product that gives the matrix rate, by backend; 8192 elsewhere."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure training."""

    size: Literal["medium", "full"]
    """Which model."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures to this file as well."""
    batch: int | None = None
    """Samples per step; by default 4 (medium) or 16 (full)."""
    freeze: Literal["llm", "all_but_lora"] = "llm"
    """What trains, on both sides."""
    base: Literal["bf16", "int8", "nf4"] = "bf16"
    """How ours stores frozen weights."""
    compile_only: bool = False
    """Plan memory, from abstract values: nothing is run, no weight is made."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How ours keeps the moments of the image tower."""
    remat: Literal["none", "dots", "full"] | None = None
    """What ours recomputes in the backward pass; by default as the preset."""
    attention: Literal["plain", "xla", "cudnn"] | None = None
    """Ours; by default what is best on this device (fusevla.model.attention_choice)."""
    reference: bool = True
    """Measure the reference too."""
    batches: int = 4
    """Different batches that are timed."""
    repeats: int = 3
    """Times that each batch is timed."""
    seed: int = 0
    """Of samples and weights."""


def make_preset(args: Args) -> "Preset":
    """libero10 with the chosen sizes. ValueError for what cannot be measured."""
    from fusevla.model.attention_choice import with_attention
    from fusevla.presets import LIBERO10

    size = BATCH_SIZE[args.size] if args.batch is None else args.batch
    if size < 2 or size % 2 or min(args.batches, args.repeats) < 1:
        raise ValueError("--batch: expected an even number of at least 2; --batches and --repeats: at least 1")
    model = model_config(args.size)
    changes: dict[str, Any] = {"remat": args.remat or model.remat, "attention": args.attention or model.attention}
    model = with_attention(dataclasses.replace(model, **changes))
    train = dataclasses.replace(LIBERO10.train, freeze=args.freeze, base=args.base, moments=args.moments, batch_size=size)
    return dataclasses.replace(LIBERO10, name=f"bench-{args.size}", model=model, train=train)


def model_config(size: str) -> "ModelConfig":
    """The two models."""
    from fusevla.presets import FULL, PI05, ExpertConfig, VisionConfig

    if size == "full":
        return FULL
    heads: dict[str, Any] = {"depth": 4, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
    return dataclasses.replace(
        FULL,
        vision=VisionConfig(width=192, depth=12, mlp_dim=768, num_heads=3),
        language=ExpertConfig(width=256, mlp_dim=1024, lora=PI05.language.lora, **heads),
        action=ExpertConfig(width=128, mlp_dim=512, lora=PI05.action.lora, **heads),
        dtype="float32",
    )


def run(args: Args) -> dict[str, Any]:
    """Everything; returns the figures."""
    import jax

    from fusevla.evaluate.bench_sides import make_sides, text_length
    from fusevla.evaluate.drawn_batches import draw_batches
    from fusevla.evaluate.machine import versions

    preset = make_preset(args)
    batches = draw_batches(preset, args.batches, args.seed, with_longest=args.compile_only)
    sides = make_sides(preset, batches, reference=args.reference)
    rate = None
    if args.compile_only:
        compile_abstract(preset, sides)
    else:
        rate = measure(args, preset, sides)
    figures: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "size": args.size,
        "batch": preset.train.batch_size,
        "freeze": args.freeze,
        "base": args.base,
        "remat": preset.model.remat,
        "attention": preset.model.attention,
        "dtype": preset.model.dtype,
        "text": [text_length(batch) for batch in sides["ours"].batches],
        "matrix_flops_per_second": rate,
    }
    figures |= {name: summarize(side, preset.train.batch_size, sides["ours"].flops, rate) for name, side in sides.items()}
    return figures | compare(figures, sides) | {"versions": versions()}


def compile_abstract(preset: "Preset", sides: dict[str, "Side"]) -> None:
    """Compiles both for shapes; only the longest text, which decides about memory."""
    from fusevla.evaluate.bench_sides import text_length
    from fusevla.train.job import abstract_frozen, abstract_state

    frozen = abstract_frozen(preset)
    for side in sides.values():
        side.batches = [max(side.batches, key=text_length)]
        side.begin(abstract_state(dataclasses.replace(preset, train=side.config)), frozen)


def measure(args: Args, preset: "Preset", sides: dict[str, "Side"]) -> float:
    """Times steps and forward passes of the sides in turn; returns the device's matrix rate."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from fusevla.evaluate.flops import matrix_rate
    from fusevla.train.job import make_model, training_key
    from fusevla.train.optim import make_optimizer
    from fusevla.train.sharding import make_mesh
    from fusevla.train.state import init_state

    trainable, frozen = make_model(preset, None, make_mesh(jax.devices()[:1]))
    model, key = eqx.combine(trainable, frozen), jax.random.key(args.seed)
    for side in sides.values():
        side.batches = [jax.device_put(batch) for batch in side.batches]
        side.forward = partial(jax.jit(side.loss), model, side.batches[0], key)
        jax.block_until_ready(side.forward())
    time_forward(sides, args.repeats)
    for side in sides.values():
        side.forward = None
        own = jax.tree.map(jnp.copy, trainable)
        side.begin(init_state(own, make_optimizer(side.config), training_key(preset)), frozen)
    del model, trainable, frozen
    time_steps(sides, args.repeats)
    return matrix_rate(preset.model.dtype, MATRIX.get(jax.default_backend(), 8192), 10, time.perf_counter)


def time_forward(sides: dict[str, "Side"], repeats: int) -> None:
    """Forward passes on the first batch, in turn."""
    import jax

    for _ in range(repeats):
        for side in sides.values():
            assert side.forward is not None
            began = time.perf_counter()
            jax.block_until_ready(side.forward())
            side.forward_taken.append(time.perf_counter() - began)


def time_steps(sides: dict[str, "Side"], repeats: int) -> None:
    """Steps on every batch, in turn. The first on each batch is not timed; the very first is compared."""
    for index in range(len(sides["ours"].batches)):
        for side in sides.values():
            _, metrics = side.run(side.batches[index])
            side.first = side.first or {name: float(metrics[name]) for name in ("loss", "grad_norm")}
            side.taken.append([])
        for _ in range(repeats):
            for side in sides.values():
                side.taken[index].append(side.run(side.batches[index])[0])


def summarize(side: "Side", size: int, useful: float, rate: float | None) -> dict[str, Any]:
    """A side's figures; seconds are means over batches of each batch's median."""
    memory = side.compiled[max(side.compiled)].memory_analysis()
    seconds = statistics.mean(map(statistics.median, side.taken)) if side.taken else None
    return {
        "samples_per_second": size / seconds if seconds else None,
        "step_seconds": seconds,
        "step_seconds_min": statistics.mean(map(min, side.taken)) if side.taken else None,
        "forward_seconds": statistics.median(side.forward_taken) if side.forward_taken else None,
        "compile_seconds": side.compile_seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": side.flops,
        "utilisation": useful / seconds / rate if seconds and rate else None,
        "first_step": side.first,
    }


def compare(figures: dict[str, Any], sides: dict[str, "Side"]) -> dict[str, Any]:
    """Ours over the reference: samples per second, memory, and how far the first steps' numbers are apart."""
    if "reference" not in sides:
        return {"ratio": None}
    ours, other = figures["ours"], figures["reference"]
    total = lambda side: side["argument_bytes"] + side["temp_bytes"]
    result: dict[str, Any] = {"ratio": None, "memory_ratio": total(ours) / total(other)}
    if ours["step_seconds"]:
        result["ratio"] = other["step_seconds"] / ours["step_seconds"]
        result["ratio_of_fastest"] = other["step_seconds_min"] / ours["step_seconds_min"]
        for name, value in other["first_step"].items():
            result[f"{name}_difference"] = abs(ours["first_step"][name] - value) / abs(value)
    return result


def show(figures: Mapping[str, Any]) -> None:
    """Prints the figures as a table."""
    ours, other = figures["ours"], figures.get("reference", {})
    print(f"{'':<24} {'ours':>14} {'reference':>14}")
    for name in ours:
        cells = [side.get(name) for side in (ours, other)]
        if isinstance(cells[0], int | float):
            print(f"{name:<24} {cells[0]:14.4g} {cells[1] if cells[1] is None else format(cells[1], '14.4g')!s:>14}")
    for name, value in figures.items():
        if not isinstance(value, dict) and value is not None:
            print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    from fusevla.evaluate.bench import publish

    publish(lambda: run(args), show, args.json)


if __name__ == "__main__":
    main()
