"""Samples to batches: the held-out split by episode, and collation with the text padded to a few lengths."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fusevla.arrays import Batch, Observation
from fusevla.data.lerobot import Episode
from fusevla.data.samples import Sample, SampleSource, prompt_sample, used_cameras
from fusevla.data.text_report import TextReport

__all__ = [
    "Sample",
    "SampleSource",
    "TextReport",
    "bucket_for",
    "collate",
    "prompt_sample",
    "split_episodes",
    "used_cameras",
]


def split_episodes(episodes: Sequence[Episode], fraction: float, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) positions of episodes, each ascending; the same for the same arguments.

    A positive ``fraction`` holds out at least one of two episodes and never all of them. Tasks that would be left without a
    training episode are held out last.

    Raises:
        ValueError: ``fraction`` outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out_fraction: expected 0 <= fraction < 1, got {fraction}")
    count = len(episodes)
    wanted = min(max(round(fraction * count), 1), count - 1) if fraction > 0 and count > 1 else 0
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    left = Counter(episode.task for episode in episodes)
    spare: list[int] = []
    lonely: list[int] = []
    for i in order:
        (spare if left[episodes[i].task] > 1 else lonely).append(i)
        left[episodes[i].task] -= 1
    held_out = frozenset([*spare, *lonely][:wanted])
    return tuple(i for i in range(count) if i not in held_out), tuple(sorted(held_out))


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``length`` tokens. ValueError when none does."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(f"text: expected at most {max(buckets)} tokens (the largest of text_buckets), got {length}")
    return min(fitting)


def collate(samples: Sequence[Sample], buckets: Sequence[int], cameras: Iterable[str] = ()) -> Batch:
    """Stacks samples; the text is padded (PAD, masked, no loss) to the smallest bucket that holds the longest.

    Cameras are ordered by name: those of the samples and ``cameras`` (of other samples, so that all batches are alike). One that
    a sample lacks is zero and masked there.

    Raises:
        ValueError: no sample, a text longer than every bucket, or a camera that no sample has.
    """
    if not samples:
        raise ValueError("collate: expected at least one sample, got none")
    length = bucket_for(max(len(sample.text.tokens) for sample in samples), buckets)
    cameras = sorted({*cameras, *(camera for sample in samples for camera in sample.images)})
    observation = Observation(
        images={camera: _stack_images(samples, camera) for camera in cameras},
        image_masks={camera: np.array([sample.images.get(camera) is not None for sample in samples]) for camera in cameras},
        state=np.stack([sample.state for sample in samples]),
        tokens=_pad([sample.text.tokens for sample in samples], length),
        token_mask=_pad([sample.text.mask for sample in samples], length),
        token_ar_mask=_pad([sample.text.ar_mask for sample in samples], length),
    )
    return Batch(
        observation=observation,
        token_loss_mask=_pad([sample.text.loss_mask for sample in samples], length),
        diffusion_loss_mask=np.array([sample.text.diffusion for sample in samples]),
        actions=np.stack([sample.actions for sample in samples]),
        action_is_pad=np.stack([sample.action_is_pad for sample in samples]),
    )


def _stack_images(samples: Sequence[Sample], camera: str) -> np.ndarray:
    present = [image for sample in samples for image in sample.images.values() if image is not None]
    if not present:
        raise ValueError(f"collate: expected at least one image in the batch, got none of {camera}")
    blank = np.zeros_like(present[0])
    images = [sample.images.get(camera) for sample in samples]
    return np.stack([blank if image is None else image for image in images])


def _pad(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Zeros (PAD, False) behind each row."""
    padded = np.zeros((len(rows), length), rows[0].dtype)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded
