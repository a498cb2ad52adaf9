"""How long the policy takes to see, think and act, beside an implementation without a cache in the same process.

    python experiments/bench_infer.py --json bench.json                          # the toy's base
    python experiments/bench_infer.py --checkpoint runs/libero10 --json bench.json
    python experiments/bench_infer.py --preset libero10 --weights none           # full size, random weights

Stages, each compiled and timed by itself:

    prefill        images and prompt into the cache, and the decision whether to think
    first_token    the same, and the first token of a thought
    reason         a greedy thought, from the cache
    act            a chunk of actions, from the cache (act_known_times: with the flow times' modulations kept from call to call)
    merged_...     prefill, reason and act with the adapters merged into the weights

The reference encodes images, prompt and all text so far anew for every token and for every Euler step. Its thoughts and actions
must be ours: how far they differ is among the figures. Stages take turns, since other work on the machine disturbs all of them.
Every thought has --new-tokens tokens: EOS gets the embedding of PAD, which comes before it, so that greedy decoding never ends.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from fusevla.arrays import Observation
    from fusevla.model.fuse import Pi0Fuse
    from fusevla.presets import Preset

Stage = Callable[[], Any]
MERGED = ("prefill", "reason", "act")
"""Stages that are also timed with merged adapters."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure inference."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures to this file as well."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A run's folder; without it, --preset and --weights."""
    preset: str = "toy"
    """Sizes and cameras."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="PATH|none")] = None
    """A checkpoint in openpi's layout, or none for random numbers; by default the preset's."""
    batch: int = 1
    """Observations that are answered together."""
    text: int = 64
    """Tokens of the prompt."""
    new_tokens: int = 64
    """Tokens of a thought."""
    repeats: int = 20
    """Times that each stage is run."""
    reference_repeats: int = 3
    """Times that the reference is run; 0 leaves it out."""


def load(args: Args) -> tuple["Pi0Fuse", "Preset"]:
    """The model as training stores it, without an EOS. Raises ``CheckpointError``, ``RequestError``, ``FileNotFoundError``."""
    import equinox as eqx
    import jax

    from fusevla.model.attention_choice import on_this_device
    from fusevla.policy.load import load_policy
    from fusevla.train.job import make_model
    from fusevla.train.request import Request, RequestError, resolve
    from fusevla.train.sharding import make_mesh

    if min(args.batch, args.text, args.repeats) < 1 or args.new_tokens < 2 or args.reference_repeats < 0:
        raise RequestError("--batch, --text and --repeats: expected at least 1; --new-tokens: 2; --reference-repeats: 0")
    if args.checkpoint is not None:
        model, info = load_policy(args.checkpoint)
        return _untiring(model), info.preset
    resolved = resolve(Request(args.preset, weights=args.weights, lora=True))
    if resolved.weights is None and not resolved.from_scratch:
        raise RequestError(f"--preset {args.preset}: its weights are not at hand; give --weights PATH, or none for random ones")
    preset = on_this_device(resolved.preset)
    parts = make_model(preset, resolved.weights, make_mesh(jax.devices()[:1]))
    return _untiring(eqx.combine(*parts)), preset


def _untiring(model: "Pi0Fuse") -> "Pi0Fuse":
    from fusevla.tokens.protocol import protocol_ids

    ids, table = protocol_ids(model.config.vocab_size), model.embedder.table
    embedder = dataclasses.replace(model.embedder, table=table.at[ids.eos].set(table[ids.pad]))  # type: ignore[union-attr]
    return dataclasses.replace(model, embedder=embedder)


def observe(args: Args, preset: "Preset") -> tuple["Observation", Any]:
    """Random pictures and words, every camera there, every prompt full; and the noise that actions start from."""
    import jax
    import numpy as np

    from fusevla.arrays import Observation
    from fusevla.tokens.protocol import protocol_ids

    rng, config, shape = np.random.default_rng(0), preset.model, (args.batch, args.text)
    ids, size = protocol_ids(config.vocab_size), config.vision.image_size
    tokens = rng.integers(3, ids.bor, shape).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = ids.bos, ids.eop
    observation = Observation(
        images={name: rng.integers(0, 256, (args.batch, size, size, 3), np.uint8) for name in preset.data.cameras},
        image_masks={name: np.ones(args.batch, bool) for name in preset.data.cameras},
        state=np.zeros((args.batch, config.action_dim), np.float32),
        tokens=tokens,
        token_mask=np.ones(shape, bool),
        token_ar_mask=np.zeros(shape, bool),
    )
    noise = rng.standard_normal((args.batch, 1, config.action_horizon, config.action_dim), np.float32)
    return jax.device_put((observation, noise))


def our_stages(args: Args, preset: "Preset", model: "Pi0Fuse", observation: "Observation", noise: Any) -> dict[str, Stage]:
    """What is timed, by name, each on inputs that are ready."""
    import jax
    import jax.numpy as jnp

    from fusevla.policy.sampling import act, append_token, choose_token, euler_times, prefill, reason
    from fusevla.tokens.protocol import protocol_ids

    encode = partial(prefill, reserve=args.new_tokens + 1)
    begin = jnp.full(args.batch, protocol_ids(preset.model.vocab_size).bor, jnp.int32)

    def first_token(model: "Pi0Fuse", observation: "Observation") -> Any:
        return choose_token(append_token(model, encode(model, observation), begin, jnp.ones(args.batch, bool)))

    see, first, move = jax.jit(encode), jax.jit(first_token), jax.jit(partial(act, num_steps=preset.num_steps))
    think = jax.jit(lambda model, state: reason(model, state, args.new_tokens)[0])
    state = see(model, observation)
    times = jax.jit(partial(euler_times, num_steps=preset.num_steps))(model)
    return {
        "prefill": lambda: see(model, observation),
        "first_token": lambda: first(model, observation),
        "reason": lambda: think(model, state),
        "act": lambda: move(model, state, noise),
        "act_known_times": lambda: move(model, state, noise, times=times),
    }


def reference_stages(args: Args, preset: "Preset", model: "Pi0Fuse", observation: "Observation", noise: Any) -> dict[str, Stage]:
    """Thinking and acting without a cache, from the observation."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fusevla.model.fuse import embed_prefix, forward
    from fusevla.model.gemma import Stream, transformer
    from fusevla.model.masks import attention_mask, positions
    from fusevla.tokens.protocol import protocol_ids

    ids, start = protocol_ids(preset.model.vocab_size), observation.tokens.shape[1]

    def encode(model: "Pi0Fuse", seen: "Observation", last: Any) -> Any:
        prefix = embed_prefix(model, seen)
        mask, where = attention_mask(prefix.valid, prefix.ar), positions(prefix.valid)
        (hidden,), _ = transformer(
            (model.language,), (Stream(prefix.tokens),), mask, where, implementation=model.config.attention
        )
        logits = model.embedder.unembed(hidden[:, hidden.shape[1] - seen.tokens.shape[1] + last])
        return jnp.argmax(jnp.asarray(logits).at[:, jnp.array(ids.protocol)].set(-jnp.inf), axis=1).astype(jnp.int32)

    next_token, velocity = jax.jit(encode), jax.jit(lambda *inputs: forward(*inputs)[1])

    def think() -> Any:
        written = np.full((args.batch, 1), ids.bor, np.int32)
        for step in range(start, start + args.new_tokens - 1):
            token = next_token(model, _followed_by(observation, written, args.new_tokens), jnp.int32(step))
            written = np.concatenate([written, np.asarray(token)[:, None]], axis=1)
        return written

    def move() -> Any:
        seen = _followed_by(observation, np.full((args.batch, 1), ids.boa, np.int32), 1)
        x, time = noise, jnp.ones((args.batch, 1))
        for _ in range(preset.num_steps):
            x, time = x - velocity(model, seen, x, time) / preset.num_steps, time - 1 / preset.num_steps
        return x

    return {"reference_reason": think, "reference_act": move}


def _followed_by(observation: "Observation", written: Any, room: int) -> "Observation":
    """The prompt and behind it ``written`` in ``room`` causal tokens, on the host: one shape whatever has been written."""
    import numpy as np

    tokens, valid, ar = (np.asarray(x) for x in (observation.tokens, observation.token_mask, observation.token_ar_mask))
    free = [(0, 0), (0, room - written.shape[1])]
    return dataclasses.replace(
        observation,
        tokens=np.concatenate([tokens, np.pad(written, free)], axis=1),
        token_mask=np.concatenate([valid, np.pad(np.ones(written.shape, bool), free)], axis=1),
        token_ar_mask=np.pad(ar, [(0, 0), (0, room)], constant_values=True),
    )


def measure(stages: dict[str, Stage], repeats: dict[str, int]) -> dict[str, list[float]]:
    """Milliseconds of every run; the stages take turns, after one run each that compiles."""
    import jax

    for stage in stages.values():
        jax.block_until_ready(stage())
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for turn in range(max(repeats.values())):
        for name, stage in stages.items():
            if turn < repeats[name]:
                began = time.perf_counter()
                jax.block_until_ready(stage())
                taken[name].append(1e3 * (time.perf_counter() - began))
    return taken


def run(args: Args) -> dict[str, Any]:
    """Everything; returns the figures."""
    import jax

    from fusevla.evaluate.machine import versions
    from fusevla.policy.policy import merged as merge
    from fusevla.train.freeze import count_parameters, has_adapters

    model, preset = load(args)
    inputs = observe(args, preset)
    stages = our_stages(args, preset, model, *inputs)
    if has_adapters(model):
        merged = our_stages(args, preset, jax.jit(merge)(model), *inputs)
        stages |= {f"merged_{name}": merged[name] for name in MERGED}
    if args.reference_repeats:
        stages |= reference_stages(args, preset, model, *inputs)
    repeats = {name: args.reference_repeats if name.startswith("reference") else args.repeats for name in stages}
    setting = {
        "device": jax.devices()[0].device_kind,
        "preset": preset.name,
        "parameters": count_parameters(model),
        "batch": args.batch,
        "cameras": len(preset.data.cameras),
        "prompt_tokens": args.text,
        "image_tokens": len(preset.data.cameras) * preset.model.vision.num_tokens,
        "new_tokens": args.new_tokens,
        "num_steps": preset.num_steps,
    }
    figures = summarize(measure(stages, repeats), args.batch * args.new_tokens)
    return setting | figures | differences(stages) | {"versions": versions()}


def summarize(taken: dict[str, list[float]], written: int) -> dict[str, Any]:
    """Latencies, tokens per second and what the reference takes in units of ours, each of them from the observation on."""
    import numpy as np

    median = {name: float(np.median(times)) for name, times in taken.items()}
    stages = {name: {"median_ms": median[name], "p90_ms": float(np.quantile(times, 0.9))} for name, times in taken.items()}
    figures: dict[str, Any] = {"stages": stages}
    for name in ("reason", "merged_reason"):
        figures[f"{name}_tokens_per_second"] = 1e3 * written / median[name] if name in median else None
    for name in ("reason", "act"):
        other = median.get(f"reference_{name}")
        for prefix in ("", "merged_"):
            ours = median[f"{prefix}prefill"] + median[f"{prefix}{name}"] if f"{prefix}{name}" in median else None
            figures[f"{prefix}{name}_ratio"] = other / ours if other and ours else None
    return figures


def differences(stages: dict[str, Stage]) -> dict[str, Any]:
    """How far other ways to the same thought and actions lead elsewhere: share of tokens, relative error of actions."""
    import numpy as np

    ours = {"act": np.asarray(stages["act"]()), "reason": np.asarray(stages["reason"]().tokens)}
    figures: dict[str, Any] = {}
    for name in ("merged_act", "reference_act"):
        if name in stages:
            error = np.linalg.norm(np.asarray(stages[name]()) - ours["act"]) / np.linalg.norm(ours["act"])
            figures[f"{name}_error"] = float(error)
    if "reference_reason" in stages:
        figures["reference_reason_tokens_equal"] = float(np.mean(np.asarray(stages["reference_reason"]()) == ours["reason"]))
    return figures


def show(figures: Mapping[str, Any]) -> None:
    """Prints the figures in lines."""
    from fusevla.evaluate import bench

    for stage, times in figures["stages"].items():
        print(f"{stage:<48} {times['median_ms']:.4g} ms median, {times['p90_ms']:.4g} ms p90")
    bench.show({name: value for name, value in figures.items() if name not in ("stages", "versions")})


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    from fusevla.evaluate.bench import publish

    publish(lambda: run(args), show, args.json)


if __name__ == "__main__":
    main()
