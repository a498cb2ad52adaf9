"""Makes the toy's base checkpoint: a tiny Pi0Fuse that sees and moves, trained on act-only data, without any plan.

    python experiments/make_toy_base.py --out toy_base            # hours on two CPU cores
    python experiments/make_toy_base.py --out toy_base --resume   # go on after an interruption

Every episode names one sub-goal ("put the red block in the tray", half of them with a distractor clause); its frames are
drawn as they are needed, so none repeats exactly. OUT receives ``params`` (openpi's layout), ``tokenizer.model``,
``norm_stats.json`` and ``log.jsonl``; OUT/state.eqx is what ``--resume`` reads. Copy the first three to fusevla/assets/toy_base.
"""

import dataclasses
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

if TYPE_CHECKING:
    from fusevla.arrays import Batch
    from fusevla.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """Pre-training of the toy base. The learning rate is constant, then falls to zero over the last ``decay_steps``."""

    out: pathlib.Path
    steps: int = 16_000
    decay_steps: int = 3_000
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


TEXT_LENGTH = 24
"""Every act-only prompt of the toy fits."""


class Frames:
    """Random access to the frames of base episodes as training samples."""

    def __init__(self, tokenizer: "Tokenizer", count: int, seed: int):
        from fusevla.data.toy import episodes

        self.tokenizer = tokenizer
        self.episodes = list(episodes("base", count, seed))
        # what follows the placing is waiting: two frames of it are enough; finding the block is the hard part: three times
        self.rows = [
            (i, t)
            for i, episode in enumerate(self.episodes)
            for t in range(episode.placed_at[0] + 2)
            for _ in range(1 if episode.plan[0] in (episode.worlds[t].held, *episode.worlds[t].placed) else 3)
        ]

    def batch(self, rng: np.random.Generator, size: int) -> "Batch":
        """``size`` random frames."""
        from fusevla.arrays import Batch, Observation

        samples = [self._sample(*self.rows[i]) for i in rng.integers(len(self.rows), size=size)]
        stacked = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        cameras = [name for name in stacked if name.endswith("_rgb")]
        here = np.ones(size, bool)
        text = {name: stacked[name] for name in ("tokens", "token_mask", "token_ar_mask")}
        observation = Observation({c: stacked[c] for c in cameras}, dict.fromkeys(cameras, here), stacked["state"], **text)
        return Batch(observation, stacked["token_loss_mask"], here, stacked["actions"], stacked["action_is_pad"])

    def _sample(self, index: int, frame: int) -> dict[str, np.ndarray]:
        from fusevla.data.annotations import act_only_prefix
        from fusevla.data.normalize import normalize
        from fusevla.data.toy import norm_stats
        from fusevla.data.toy_world import draw, state
        from fusevla.data.transforms import action_chunk
        from fusevla.presets import TOY_MODEL
        from fusevla.tokens.protocol import digitize_state, encode_sample

        episode, stats = self.episodes[index], norm_stats()
        felt = normalize(state(episode.worlds[frame]), stats["state"])
        bins, _ = digitize_state(felt)
        text = encode_sample(self.tokenizer, act_only_prefix(episode.task), bins, None, "act", TEXT_LENGTH)
        actions, is_pad = action_chunk(normalize(episode.actions, stats["actions"]), frame, TOY_MODEL.action_horizon)

        def padded(values: np.ndarray) -> np.ndarray:
            return np.pad(values, (0, TEXT_LENGTH - len(values)))

        return {
            **draw(episode.worlds[frame]),
            "state": felt.astype(np.float32),
            "tokens": padded(text.tokens),
            "token_mask": padded(text.mask),
            "token_ar_mask": padded(text.ar_mask),
            "token_loss_mask": padded(text.loss_mask),
            "actions": actions.astype(np.float32),
            "action_is_pad": is_pad,
        }


def prefetched(frames: Frames, args: Args, start: int) -> Iterator["Batch"]:
    """Batches of step ``start`` on, made in a thread beside the training; a step's batch depends on seed and step only."""
    ready: queue.Queue[Batch] = queue.Queue(4)

    def work() -> None:
        for step in range(start, args.steps):
            ready.put(frames.batch(np.random.default_rng((args.seed, 1, step)), args.batch_size))

    threading.Thread(target=work, daemon=True).start()
    return (ready.get() for _ in range(start, args.steps))


def make_step(args: Args) -> tuple[Any, Any]:
    """(jitted training step, optimizer)."""
    import jax
    import optax

    from fusevla.losses import joint_loss

    stable = args.steps - args.decay_steps
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(args.peak / args.warmup_steps, args.peak, args.warmup_steps),
            optax.constant_schedule(args.peak),
            optax.cosine_decay_schedule(args.peak, args.decay_steps),
        ],
        [args.warmup_steps, stable],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=1e-4))

    def train_step(model, state, batch, key):
        def loss_of(model):
            return joint_loss(model, batch, key, flow_draws=args.flow_draws)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(model)
        updates, state = optimizer.update(grads, state, model)
        return optax.apply_updates(model, updates), state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1)), optimizer


def make_error_ratio(batch: "Batch", reference: "Batch") -> Any:
    """Jitted: squared error of sampled actions over that of the training mean (per step of the chunk), on real steps."""
    import jax
    import jax.numpy as jnp

    from fusevla.policy.sampling import sample_actions

    real = jnp.logical_not(reference.action_is_pad)[..., None].astype(jnp.float32)
    mean = jnp.sum(reference.actions * real, axis=0) / jnp.sum(real, axis=0)
    weight = jnp.logical_not(batch.action_is_pad)[..., None].astype(jnp.float32)

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


def train(args: Args, tokenizer: "Tokenizer") -> Any:
    """Runs or resumes the training; returns the model."""
    import equinox as eqx
    import jax

    from fusevla.model.fuse import init, with_lora
    from fusevla.presets import TOY_MODEL

    bare = dataclasses.replace(
        TOY_MODEL,
        vocab_size=tokenizer.vocab_size,
        language=dataclasses.replace(TOY_MODEL.language, lora=None),
        action=dataclasses.replace(TOY_MODEL.action, lora=None),
    )
    model = with_lora(init(bare, jax.random.key(args.seed)), bare, jax.random.key(0))
    train_step, optimizer = make_step(args)
    frames, held_out = Frames(tokenizer, args.episodes, args.seed), Frames(tokenizer, args.held_out, args.seed + 1_000_003)
    model = centred(model, frames.batch(np.random.default_rng(args.seed), 256))
    carry = (model, optimizer.init(model), np.asarray(0))
    if args.resume:
        carry = eqx.tree_deserialise_leaves(args.out / "state.eqx", carry)
    error_ratio = make_error_ratio(held_out.batch(np.random.default_rng(0), 256), frames.batch(np.random.default_rng(1), 1024))
    model, state, start = carry
    losses, begun = [], time.monotonic()
    for step, batch in enumerate(prefetched(frames, args, int(start)), int(start)):
        model, state, metrics = train_step(model, state, batch, jax.random.fold_in(jax.random.key(args.seed + 1), step))
        losses.append(metrics["action_loss"])
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            ratio, each = error_ratio(model, jax.random.key(2))
            record = {
                "step": step + 1,
                "seconds": round(time.monotonic() - begun, 1),
                "action_loss": float(np.mean([float(loss) for loss in losses])),
                "held_out_action_error_ratio": float(ratio),
                "per_dimension": np.round(np.asarray(each, np.float64), 4).tolist(),
            }
            losses = []
            eqx.tree_serialise_leaves(args.out / "state.tmp.eqx", (model, state, np.asarray(step + 1)))
            (args.out / "state.tmp.eqx").replace(args.out / "state.eqx")
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    return model


def main(args: Args) -> None:
    """Trains the base and writes everything that belongs to it."""
    from fusevla.data.normalize import save_norm_stats
    from fusevla.data.toy import norm_stats
    from fusevla.data.toy_text import toy_tokenizer
    from fusevla.model.openpi import save_params

    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "state.eqx").exists() and not args.resume:
        raise SystemExit(f"{args.out} holds a training already; give --resume to go on with it, or another --out")
    tokenizer = toy_tokenizer()
    tokenizer.save(args.out / "tokenizer.model")
    save_norm_stats(args.out / "norm_stats.json", norm_stats())
    save_params(args.out / "params", train(args, tokenizer))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
