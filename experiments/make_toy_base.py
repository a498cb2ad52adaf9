"""Makes the toy's base checkpoint: a tiny Pi0Fuse that sees and moves, trained on act-only data, without any plan.

    python experiments/make_toy_base.py --out toy_base            # half an hour on two CPU cores
    python experiments/make_toy_base.py --out toy_base --resume   # go on after an interruption

Every episode names one sub-goal ("put the red block in the tray", half of them with a distractor clause); its frames are
drawn as they are needed, so none repeats exactly. Two stages:

1. *see*: the image tower and the first language layer learn to say, at every word of the prompt that names a thing, where
   that thing lies (a linear read-out that is thrown away). It stands for the vision-language pre-training that pi0.5 starts
   from; without it 5,000 steps of the second stage did not find the named block, with it 3,000 did.
2. *move*: everything learns to act, by flow matching; a quarter of the frames repeat their instruction as text instead, so that
   the language expert stays one that can say a word it has read, as the published base's can.

OUT receives ``params`` (openpi's layout), ``tokenizer.model``, ``norm_stats.json`` and ``log.jsonl``; OUT/seen.eqx and
OUT/state.eqx are what ``--resume`` reads. Copy the first four to fusevla/assets/toy_base.
"""

import dataclasses
import json
import pathlib
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

if TYPE_CHECKING:
    from fusevla.arrays import Batch
    from fusevla.data.toy_frames import Frames, Places
    from fusevla.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """Pre-training of the toy base. The rate of *move* is constant, then falls to zero over the last ``decay_steps``."""

    out: pathlib.Path
    see_steps: int = 3_000
    see_peak: float = 2e-3
    steps: int = 9_000
    """Of the second stage, *move*."""
    decay_steps: int = 4_000
    warmup_steps: int = 200
    batch_size: int = 16
    flow_draws: int = 4
    peak: float = 1.5e-3
    episodes: int = 20_000
    """Different episodes; their frames are drawn in random order, with replacement."""
    held_out: int = 200
    eval_every: int = 200
    seed: int = 0
    resume: bool = False


def prefetched(frames: "Frames", seed: int, steps: range, size: int) -> "Iterator[tuple[Batch, Places]]":
    """Batches of the steps, made in a thread beside the training; a step's batch depends on seed and step only."""
    ready: queue.Queue[tuple[Batch, Places]] = queue.Queue(4)

    def work() -> None:
        for step in steps:
            ready.put(frames.batch(np.random.default_rng((seed, step)), size))

    threading.Thread(target=work, daemon=True).start()
    return (ready.get() for _ in steps)


def make_step(loss_of: Any, schedule: Any) -> tuple[Any, Any]:
    """(jitted training step, optimizer) for ``loss_of(weights, batch, key)``, which returns (loss, metrics)."""
    import jax
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=1e-4))

    def train_step(weights, state, batch, key):
        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, batch, key)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1)), optimizer


def make_error_ratio(batch: "Batch", reference: "Batch") -> Any:
    """Jitted: squared error of sampled actions over that of the training mean (per step of the chunk), of acting samples."""
    import jax
    import jax.numpy as jnp

    from fusevla.policy.sampling import sample_actions

    real = jnp.logical_not(reference.action_is_pad)[..., None].astype(jnp.float32)
    mean = jnp.sum(reference.actions * real, axis=0) / jnp.sum(real, axis=0)
    counted = jnp.logical_not(batch.action_is_pad) & batch.diffusion_loss_mask[:, None]
    weight = counted[..., None].astype(jnp.float32)

    def error(predicted):
        return jnp.sum(jnp.square(predicted - batch.actions) * weight, axis=(0, 1))

    def ratio(model, key):
        noise = jax.random.normal(key, (batch.actions.shape[0], 1, *batch.actions.shape[1:]))
        ours, constant = error(sample_actions(model, batch.observation, noise)[:, 0]), error(mean)
        return jnp.sum(ours) / jnp.sum(constant), ours / constant

    return jax.jit(ratio)


POSITION_STD = 0.5


def centred(model: Any, batch: "Batch") -> Any:
    """The model with a tower that starts out seeing differences: patches centred on their mean, positions as strong as they.

    With the ordinary initialisation nine tenths of a patch token is the table's colour, the same everywhere, and a position
    is worth a tenth of it; places are then learned many times slower.
    """
    import equinox as eqx
    import jax.numpy as jnp

    from fusevla.model.fuse import to_float

    tower = model.vision
    images = np.concatenate([np.asarray(to_float(image)) for image in batch.observation.images.values()])
    side, kernel = model.config.vision.patch_size, np.asarray(tower.patch.kernel)
    rows = images.shape[1] // side
    patches = images.reshape(-1, rows, side, rows, side, 3).mean(axis=(0, 1, 3))
    bias = -np.einsum("rci,rcid->d", patches, kernel)
    position = tower.position * (POSITION_STD / float(np.std(tower.position)))
    return eqx.tree_at(lambda m: (m.vision.patch.bias, m.vision.position), model, (jnp.asarray(bias), position))


def place_loss(weights: Any, batch: "tuple[Batch, Places]", key: Any) -> Any:
    """Mean squared error of a linear read-out, after the first language layer, of where the named things are."""
    import jax
    import jax.numpy as jnp

    from fusevla.model.fuse import embed_prefix
    from fusevla.model.gemma import Expert, Stream, transformer
    from fusevla.model.masks import attention_mask, positions

    (model, readout), (sample, (where, named)) = weights, batch
    prefix = embed_prefix(model, sample.observation)
    first = Expert(jax.tree.map(lambda stacked: stacked[:1], model.language.layers), model.language.final_norm)
    mask, at = attention_mask(prefix.valid, prefix.ar), positions(prefix.valid)
    (hidden,), _ = transformer((first,), (Stream(prefix.tokens),), mask, at, implementation=model.config.attention)
    error = jnp.mean(jnp.square(readout(hidden[:, -named.shape[1] :]) - where), axis=-1)
    loss = jnp.sum(error * named) / jnp.sum(named)
    return loss, {"place_loss": loss}


def see(args: Args, model: Any, frames: "Frames") -> Any:
    """The first stage: the model after it has learned where the things are that a prompt names."""
    import jax
    import optax

    from fusevla.model.siglip import init_dense

    schedule = optax.warmup_cosine_decay_schedule(args.see_peak / 20, args.see_peak, 100, args.see_steps, args.see_peak / 20)
    train_step, optimizer = make_step(place_loss, schedule)
    weights = (model, init_dense(jax.random.key(args.seed + 2), model.config.language.width, 4))
    state, losses, begun = optimizer.init(weights), [], time.monotonic()
    for step, batch in enumerate(prefetched(frames, args.seed + 3, range(args.see_steps), args.batch_size)):
        weights, state, metrics = train_step(weights, state, batch, None)
        losses.append(metrics)
        if (step + 1) % args.eval_every == 0:
            note(args.out, {"stage": "see", "step": step + 1, "seconds": time.monotonic() - begun, **means(losses)})
            losses = []
    return weights[0]


def move(args: Args, model: Any, frames: "Frames", held_out: "Frames") -> Any:
    """The second stage, resumed where OUT/state.eqx exists; returns the model."""
    import equinox as eqx
    import jax
    import optax

    from fusevla.losses import joint_loss

    schedule = optax.join_schedules(
        [
            optax.linear_schedule(args.peak / args.warmup_steps, args.peak, args.warmup_steps),
            optax.constant_schedule(args.peak),
            optax.cosine_decay_schedule(args.peak, args.decay_steps),
        ],
        [args.warmup_steps, args.steps - args.decay_steps],
    )
    train_step, optimizer = make_step(lambda m, batch, key: joint_loss(m, batch[0], key, flow_draws=args.flow_draws), schedule)
    carry = (model, optimizer.init(model), np.asarray(0))
    if (args.out / "state.eqx").exists():
        carry = eqx.tree_deserialise_leaves(args.out / "state.eqx", carry)
    model, state, start = carry
    judged, reference = held_out.batch(np.random.default_rng(0), 256)[0], frames.batch(np.random.default_rng(1), 1024)[0]
    error_ratio = make_error_ratio(judged, reference)
    steps, losses, begun = range(int(start), args.steps), [], time.monotonic()
    for step, batch in zip(steps, prefetched(frames, args.seed, steps, args.batch_size), strict=True):
        model, state, metrics = train_step(model, state, batch, jax.random.fold_in(jax.random.key(args.seed + 1), step))
        losses.append(metrics)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            ratio, each = error_ratio(model, jax.random.key(2))
            record = {"stage": "move", "step": step + 1, "seconds": time.monotonic() - begun, **means(losses)}
            record |= {"held_out_action_error_ratio": float(ratio), "per_dimension": [float(value) for value in each]}
            eqx.tree_serialise_leaves(args.out / "state.tmp.eqx", (model, state, np.asarray(step + 1)))
            (args.out / "state.tmp.eqx").replace(args.out / "state.eqx")
            note(args.out, record)
            losses = []
    return model


def means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each loss over the steps."""
    return {name: float(np.mean([row[name] for row in metrics])) for name in metrics[0] if name.endswith("_loss")}


def note(out: pathlib.Path, record: dict[str, Any]) -> None:
    """One line of OUT/log.jsonl and of the screen."""
    line = json.dumps(record | {"seconds": round(record["seconds"], 1)})
    with (out / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    print(line, flush=True)


def train(args: Args, tokenizer: "Tokenizer") -> Any:
    """Runs or resumes both stages; returns the model."""
    import equinox as eqx
    import jax

    from fusevla.data.toy_frames import Frames
    from fusevla.model.fuse import init
    from fusevla.presets import TOY_MODEL, without_lora

    bare = dataclasses.replace(without_lora(TOY_MODEL), vocab_size=tokenizer.vocab_size)
    model = init(bare, jax.random.key(args.seed))
    frames, held_out = Frames(tokenizer, args.episodes, args.seed), Frames(tokenizer, args.held_out, args.seed + 1_000_003)
    if (args.out / "seen.eqx").exists():
        model = eqx.tree_deserialise_leaves(args.out / "seen.eqx", model)
    else:
        model = see(args, centred(model, frames.batch(np.random.default_rng(args.seed), 256)[0]), frames)
        eqx.tree_serialise_leaves(args.out / "seen.eqx", model)
    return move(args, model, frames, held_out)


def main(args: Args) -> None:
    """Trains the base and writes everything that belongs to it."""
    from fusevla.data.normalize import save_norm_stats
    from fusevla.data.toy import norm_stats
    from fusevla.data.toy_text import toy_tokenizer
    from fusevla.model.openpi import save_params

    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "seen.eqx").exists() and not args.resume:
        raise SystemExit(f"{args.out} holds a training already; give --resume to go on with it, or another --out")
    tokenizer = toy_tokenizer()
    tokenizer.save(args.out / "tokenizer.model")
    save_norm_stats(args.out / "norm_stats.json", norm_stats())
    model = train(args, tokenizer)
    shutil.rmtree(args.out / "params", ignore_errors=True)  # of an earlier, shorter training
    save_params(args.out / "params", model)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
