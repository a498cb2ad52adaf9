"""The host side of a run: sets, tokenizer, statistics and samples, from what the preset says about data.

A new run makes all of it; a resumed one takes tokenizer and statistics from its checkpoint, so that nothing that changed on
disk since then changes the run. Several sets become one source of samples, a ``Mixture``.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fusevla.data.annotations import Annotations, load_annotations, possible_thoughts
from fusevla.data.batch import Sample, SampleSource, bucket_for, split_episodes
from fusevla.data.lerobot import LeRobotSet, open_set
from fusevla.data.loader import Source
from fusevla.data.mixture import Mixture
from fusevla.data.normalize import NormStats, load_norm_stats, normalize, pooled_norm_stats, stats_from_json
from fusevla.data.samples import used_cameras
from fusevla.presets import DataConfig, ModelConfig, Preset
from fusevla.tokens.protocol import digitize_state, encode_sample
from fusevla.tokens.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fusevla.train.checkpoint import RunInfo

MEASURED = 1024
"""Samples whose text lengths decide which buckets are worth compiling."""
RARE = 0.02
"""A bucket that fewer batches than this share would use is not compiled: its batches take the next larger one."""
LENGTH_SEED = 0


@dataclasses.dataclass(frozen=True)
class OpenedSet:
    """One set with its annotations, split by episode (positions)."""

    frames: LeRobotSet
    annotations: Annotations | None
    training: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Material:
    """The host side of a run."""

    preset: Preset
    """With data paths, vocabulary and text buckets as they turned out."""
    tokenizer: Tokenizer
    stats: dict[str, NormStats] | None
    training: tuple[SampleSource, ...]
    """One for each set."""
    held_out: tuple[SampleSource, ...]
    """Of the sets that keep episodes for validation; perhaps none."""

    @property
    def samples(self) -> Source[Sample]:
        """What is trained on."""
        return mixed(self.training, self.preset.data.data_weights)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Of all sets: one that lacks some has them masked."""
        return tuple(sorted({camera for source in self.training for camera in source.cameras}))

    @property
    def lengths(self) -> list[int]:
        """Text lengths that training batches can have: what the step is compiled for."""
        buckets = sorted(self.preset.data.text_buckets)
        return [bucket for bucket in buckets if bucket <= bucket_for(longest_text(self.training), buckets)]


def mixed(sources: Sequence[SampleSource], weights: Sequence[float] = ()) -> Source[Sample]:
    """The only source itself, or the mixture of several. Raises what ``Mixture`` raises."""
    return Mixture(sources, weights or None) if len(sources) > 1 else sources[0]


def make_toy_set(folder: Path) -> None:
    """Writes the toy's demonstrations where they are not there yet; an interrupted attempt leaves nothing behind."""
    if folder.exists():
        return
    from fusevla.data.toy import write_toy_set

    write_toy_set(folder)


def open_sets(data: DataConfig) -> tuple[OpenedSet, ...]:
    """Every set that ``data`` names, in that order. Raises ``LeRobotError``, ``AnnotationError`` or ``FileNotFoundError``."""
    return tuple(_open(data, Path(folder), Path(annotations)) for folder, annotations in data.sets)


def _open(data: DataConfig, folder: Path, annotations: Path) -> OpenedSet:
    frames = open_set(folder.expanduser(), data.columns, used_cameras(data))
    annotations = annotations.expanduser()
    thoughts = load_annotations(annotations) if data.use_reasoning or annotations.is_file() else None
    return OpenedSet(frames, thoughts, *split_episodes(frames.episodes, data.held_out_fraction))


def set_texts(frames: LeRobotSet, annotations: Annotations | None) -> list[str]:
    """Every text of a set."""
    texts = [episode.task for episode in frames.episodes]
    for annotation in annotations.episodes.values() if annotations else ():
        for thought in possible_thoughts(annotation):
            texts += [thought.prefix, thought.target or ""]
    return texts


def make_tokenizer(choice: str, texts: Iterable[str], model: ModelConfig) -> Tokenizer:
    """Reads a ``.model`` file, or with ``train`` makes a small one of ``texts`` (at most the model's size)."""
    return train_tokenizer(texts, vocab_size=min(model.vocab_size, 8192)) if choice == "train" else load_tokenizer(choice)


def make_stats(data: DataConfig, sets: Sequence[OpenedSet]) -> dict[str, NormStats] | None:
    """As ``data.norm`` says; ``auto`` reads the norm_stats.json of a single folder, or computes them.

    They are computed over the training episodes of all sets together, each frame counted once, whatever its set's weight.
    """
    if data.norm == "none":
        return None
    if data.norm != "auto":
        return load_norm_stats(data.norm)
    stored = sets[0].frames.root / "norm_stats.json"
    if len(sets) == 1 and stored.is_file():
        return load_norm_stats(stored)
    return pooled_norm_stats([(opened.frames, opened.training) for opened in sets])


def choose_buckets(sources: Sequence[SampleSource], weights: Sequence[float], batch_size: int) -> tuple[int, ...]:
    """The buckets of the preset that batches of this size will use, those of the longest possible sample and text included.

    Lengths are measured on a fixed draw of samples, without decoding an image.
    """
    data, limit, samples = sources[0].data, sources[0].max_len, mixed(sources, weights)
    candidates = sorted({min(bucket, limit) for bucket in data.text_buckets} | {limit})
    top = bucket_for(longest_text(sources), candidates)
    generator = np.random.default_rng(LENGTH_SEED)
    indices = generator.integers(0, len(samples), (max(MEASURED // batch_size, 16), batch_size))
    longest = [max(_text_length(samples, int(index)) for index in batch) for batch in indices]
    used = np.array([bucket_for(length, candidates) for length in longest])
    common = {bucket for bucket in candidates if bucket < top and (used == bucket).mean() >= RARE}
    return tuple(sorted(common | {top, limit}))


def longest_text(sources: Sequence[SampleSource]) -> int:
    """Tokens of the longest text that the sources can draw."""
    return max(min(max(source.report.longest.values()), source.max_len) for source in sources)


def _text_length(samples: Source[Sample], index: int) -> int:
    if isinstance(samples, Mixture):
        which, index, _ = samples.locate(index, 0, LENGTH_SEED)
        samples = samples.sources[which]
    assert isinstance(samples, SampleSource)
    thought = samples.thought(index, 0, LENGTH_SEED)
    state = np.asarray(samples.frames.state[samples.rows[index]], np.float32)
    bins, _ = digitize_state(state if samples.stats is None else normalize(state, samples.stats["state"]))
    return len(encode_sample(samples.tokenizer, thought.prefix, bins, thought.target, thought.kind, samples.max_len).tokens)


def prepare(preset: Preset, tokenizer_choice: str, resumed: RunInfo | None = None) -> Material:
    """Opens the sets and makes tokenizer, statistics and samples; raises what those raise, before anything is compiled."""
    data = preset.data
    sets = open_sets(data)
    if resumed is None:
        texts = (text for opened in sets for text in set_texts(opened.frames, opened.annotations))
        tokenizer = make_tokenizer(tokenizer_choice, texts, preset.model)
        stats = make_stats(data, sets)
        preset = with_vocabulary(preset, tokenizer.vocab_size)
    else:
        tokenizer = Tokenizer(resumed.tokenizer, resumed.preset.model.vocab_size)
        stats = None if resumed.norm_stats is None else stats_from_json(resumed.norm_stats)

    def source(opened: OpenedSet, episodes: tuple[int, ...], validation: bool = False) -> SampleSource:
        return SampleSource(opened.frames, opened.annotations, tokenizer, stats, data, preset.model, episodes, validation)

    training = tuple(source(opened, opened.training) for opened in sets)
    if resumed is None:
        buckets = choose_buckets(training, data.data_weights, preset.train.batch_size)
        preset = dataclasses.replace(preset, data=dataclasses.replace(data, text_buckets=buckets))
    held_out = tuple(source(opened, opened.held_out, validation=True) for opened in sets if opened.held_out)
    return Material(preset, tokenizer, stats, training, held_out)


def with_vocabulary(preset: Preset, size: int) -> Preset:
    """The preset with the model's vocabulary set to the tokenizer's."""
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=size))
