"""From a preset to everything a run needs: set, tokenizer, statistics, samples, and the model with its base weights.

A new run makes all of it; a resumed one takes preset, tokenizer and statistics from its checkpoint, so that nothing that
changed on disk since then changes the run.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from fusevla.data.annotations import Annotations, load_annotations, possible_thoughts
from fusevla.data.batch import SampleSource, bucket_for, split_episodes
from fusevla.data.lerobot import LeRobotSet, open_set
from fusevla.data.normalize import NormStats, compute_norm_stats, load_norm_stats, normalize, stats_from_json, stats_to_json
from fusevla.data.samples import used_cameras
from fusevla.model import fuse
from fusevla.model.fetch import CheckpointError, find_params
from fusevla.model.fuse import Pi0Fuse
from fusevla.model.openpi import load_params
from fusevla.presets import DataConfig, ModelConfig, Preset
from fusevla.tokens.protocol import digitize_state, encode_sample
from fusevla.tokens.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fusevla.train.checkpoint import BaseWeights, RunInfo, fingerprint, load_frozen
from fusevla.train.freeze import count_parameters, dtype_spec, partition
from fusevla.train.sharding import replicate, replicated

STORE_BELOW = 256 * 2**20
"""Frozen leaves of fewer bytes are stored with the checkpoints, so that these stand alone."""
MEASURED = 1024
"""Samples whose text lengths decide which buckets are worth compiling."""
RARE = 0.02
"""A bucket that fewer batches than this share would use is not compiled: its batches take the next larger one."""
LENGTH_SEED = 0


@dataclasses.dataclass(frozen=True)
class Material:
    """The host side of a run."""

    preset: Preset
    """With data paths, vocabulary and text buckets as they turned out."""
    tokenizer: Tokenizer
    stats: dict[str, NormStats] | None
    training: SampleSource
    held_out: SampleSource | None

    @property
    def lengths(self) -> list[int]:
        """Text lengths that training batches can have: what the step is compiled for."""
        buckets = sorted(self.preset.data.text_buckets)
        return [bucket for bucket in buckets if bucket <= bucket_for(longest_text(self.training), buckets)]


def make_toy_set(folder: Path) -> None:
    """Writes the toy's demonstrations where they are not there yet; an interrupted attempt leaves nothing behind."""
    if folder.exists():
        return
    from fusevla.data.toy import write_toy_set

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as partial:
        write_toy_set(Path(partial) / "set").rename(folder)


def annotations_path(data: DataConfig) -> Path:
    """The annotations that are meant: those given, else the ones inside the set."""
    if data.annotations is not None:
        return Path(data.annotations).expanduser()
    return Path(cast(str, data.data)).expanduser() / "cot_simple.json"


def read_annotations(data: DataConfig) -> Annotations | None:
    """None where reasoning is off and there are none."""
    path = annotations_path(data)
    if not data.use_reasoning and not path.is_file():
        return None
    return load_annotations(path)


def make_tokenizer(choice: str, annotations: Annotations | None, frames: LeRobotSet, model: ModelConfig) -> Tokenizer:
    """Reads a ``.model`` file, or with ``train`` makes a small one from every text of the set (at most the model's size)."""
    if choice != "train":
        return load_tokenizer(choice)
    texts = [episode.task for episode in frames.episodes]
    for annotation in annotations.episodes.values() if annotations else ():
        for thought in possible_thoughts(annotation):
            texts += [thought.prefix, thought.target or ""]
    return train_tokenizer(texts, vocab_size=min(model.vocab_size, 8192))


def make_stats(data: DataConfig, frames: LeRobotSet, training: Sequence[int]) -> dict[str, NormStats] | None:
    """As ``data.norm`` says; ``auto`` reads the folder's norm_stats.json, or computes them over the training episodes."""
    if data.norm == "none":
        return None
    if data.norm != "auto":
        return load_norm_stats(data.norm)
    stored = Path(cast(str, data.data)).expanduser() / "norm_stats.json"
    return load_norm_stats(stored) if stored.is_file() else compute_norm_stats(frames, training)


def choose_buckets(source: SampleSource, batch_size: int) -> tuple[int, ...]:
    """The buckets of the preset that batches of this size will use, those of the longest possible sample and text included.

    Lengths are measured on a fixed draw of samples, without decoding an image.
    """
    candidates = sorted({min(bucket, source.max_len) for bucket in source.data.text_buckets} | {source.max_len})
    top = bucket_for(longest_text(source), candidates)
    generator = np.random.default_rng(LENGTH_SEED)
    indices = generator.integers(0, len(source), (max(MEASURED // batch_size, 16), batch_size))
    longest = [max(_text_length(source, int(index)) for index in batch) for batch in indices]
    used = np.array([bucket_for(length, candidates) for length in longest])
    common = {bucket for bucket in candidates if bucket < top and (used == bucket).mean() >= RARE}
    return tuple(sorted(common | {top, source.max_len}))


def longest_text(source: SampleSource) -> int:
    """Tokens of the longest text that the source can draw."""
    return min(max(source.report.longest.values()), source.max_len)


def _text_length(source: SampleSource, index: int) -> int:
    thought = source.thought(index, 0, LENGTH_SEED)
    state = np.asarray(source.frames.state[source.rows[index]], np.float32)
    bins, _ = digitize_state(state if source.stats is None else normalize(state, source.stats["state"]))
    return len(encode_sample(source.tokenizer, thought.prefix, bins, thought.target, thought.kind, source.max_len).tokens)


def prepare(preset: Preset, tokenizer_choice: str, resumed: RunInfo | None = None) -> Material:
    """Opens the set and makes tokenizer, statistics and samples; raises what those raise, before anything is compiled."""
    data = preset.data
    frames = open_set(cast(str, data.data), data.columns, used_cameras(data))
    annotations = read_annotations(data)
    training, held_out = split_episodes(frames.episodes, data.held_out_fraction)
    if resumed is None:
        tokenizer = make_tokenizer(tokenizer_choice, annotations, frames, preset.model)
        stats = make_stats(data, frames, training)
        preset = with_vocabulary(preset, tokenizer.vocab_size)
    else:
        tokenizer = Tokenizer(resumed.tokenizer, resumed.preset.model.vocab_size)
        stats = None if resumed.norm_stats is None else stats_from_json(resumed.norm_stats)
    make = functools.partial(SampleSource, frames, annotations, tokenizer, stats, preset.data, preset.model)
    source = make(training)
    if resumed is None:
        buckets = choose_buckets(source, preset.train.batch_size)
        preset = dataclasses.replace(preset, data=dataclasses.replace(preset.data, text_buckets=buckets))
    return Material(preset, tokenizer, stats, source, make(held_out, validation=True) if held_out else None)


def with_vocabulary(preset: Preset, size: int) -> Preset:
    """The preset with the model's vocabulary set to the tokenizer's."""
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=size))


def model_key(preset: Preset) -> jax.Array:
    """The key of random weights and fresh adapters."""
    return jax.random.fold_in(jax.random.key(preset.train.seed), 1)


def training_key(preset: Preset) -> jax.Array:
    """The base key of the run."""
    return jax.random.fold_in(jax.random.key(preset.train.seed), 2)


def make_model(preset: Preset, weights: str | None, mesh: Mesh) -> tuple[Pi0Fuse, Pi0Fuse]:
    """(trainable, frozen) on all devices of ``mesh``, from a checkpoint in openpi's layout or (``None``) random.

    Loading goes straight to float32 (trainable) and bfloat16 (frozen).
    """
    config, mode = preset.model, preset.train.freeze
    if weights is None:
        # Compiled for one use only: on a CPU, optimising the many random-number kernels takes longer than running them.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make = jax.jit(functools.partial(fuse.init, config), out_shardings=replicated(mesh), compiler_options=options)
        model = make(model_key(preset))
    else:
        dtypes = dtype_spec(fuse.abstract(config), mode)
        model = load_params(weights, config, dtypes, replicated(mesh), key=model_key(preset))
    trainable, frozen = partition(model, mode)
    return replicate(trainable, mesh), replicate(frozen, mesh)


def frozen_bytes(frozen: Pi0Fuse) -> int:
    """Size of the frozen leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))


def base_of(frozen: Pi0Fuse, weights: str | None) -> BaseWeights:
    """Where the frozen leaves can be found again; they are stored where they are small, or come from nowhere else."""
    path = None if weights is None else str(find_params(weights))
    some = count_parameters(frozen) > 0
    return BaseWeights(path, fingerprint(frozen), stored=some and (path is None or frozen_bytes(frozen) <= STORE_BELOW))


def run_info(material: Material, base: BaseWeights, versions: dict[str, str]) -> RunInfo:
    """What every checkpoint of the run carries beside its arrays."""
    stats = None if material.stats is None else stats_to_json(material.stats)
    return RunInfo(material.preset, base, material.tokenizer.model_bytes, stats, versions)


def restore_frozen(checkpoints: Path, info: RunInfo, mesh: Mesh) -> Pi0Fuse:
    """The frozen leaves of a run, from beside its checkpoints or from the base weights, verified by their fingerprint.

    Raises ``CheckpointError`` where they are gone or not the same.
    """
    _, like = partition(fuse.abstract(info.preset.model), info.preset.train.freeze)
    if not jax.tree.leaves(like):
        return like
    if info.base.stored:
        frozen = load_frozen(checkpoints, like, replicated(mesh))
    elif info.base.path is None:
        raise CheckpointError(f"{checkpoints}: the frozen leaves were neither stored nor loaded from a path; start the run again")
    else:
        _, frozen = make_model(info.preset, info.base.path, mesh)
    found = fingerprint(frozen)
    if found != info.base.fingerprint:
        raise CheckpointError(
            f"{info.base.path or checkpoints}: expected the frozen leaves this run began with (fingerprint "
            f"{info.base.fingerprint}), got others ({found}); put the same base weights back"
        )
    return frozen


def abstract_trainable(preset: Preset) -> Pi0Fuse:
    """Shapes of the trainable leaves."""
    return partition(fuse.abstract(preset.model), preset.train.freeze)[0]


def combine(trainable: Pi0Fuse, frozen: Pi0Fuse) -> Pi0Fuse:
    """The whole model."""
    return eqx.combine(trainable, frozen)
