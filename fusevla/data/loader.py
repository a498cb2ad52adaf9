"""Batches in a seeded global order, on grain: the same for any number of workers and hosts, resumed from the step alone.

The order is a pure function of (seed, step): epoch e visits ``permutation(seed, e)``, epochs follow each other without a
gap, step s takes the samples ``s * batch_size ...`` of that stream. Hosts take contiguous parts of every global batch, so
their parts are disjoint, together complete, and the training does not depend on how many there are.
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

__all__ = ["Loader", "Source", "global_order", "make_loader"]

S_co = TypeVar("S_co", covariant=True)
S = TypeVar("S")
B = TypeVar("B")


@runtime_checkable
class Source(Protocol[S_co]):
    """Random access to samples: picklable, pure in (index, epoch, seed), ``0 <= index < len(source)``."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, epoch: int, seed: int) -> S_co:
        """The sample ``index`` as it is drawn in ``epoch`` of the run with ``seed``."""
        ...


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(size)


def global_order(position: int, size: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """(row, epoch) of the sample at ``position`` of the endless stream over ``size`` samples."""
    epoch, index = divmod(position, size)
    return (int(_permutation(size, seed, epoch)[index]) if shuffle else index), epoch


@dataclasses.dataclass(frozen=True)
class _Stream(Generic[S, B]):
    """This host's batches from ``start_step`` on, as grain's random-access source: element k is its k-th batch.

    Whole batches are the unit of work of a worker: one message for each instead of one for every sample, and an order that
    does not depend on how many workers there are.
    """

    source: Source[S]
    collate: Callable[[Sequence[S]], B]
    local_batch: int
    batch_size: int
    shard_index: int
    seed: int
    shuffle: bool
    start_step: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> B:
        first = (self.start_step + index) * self.batch_size + self.shard_index * self.local_batch
        order = (global_order(first + i, len(self.source), self.seed, self.shuffle) for i in range(self.local_batch))
        return self.collate([self.source(row, epoch, self.seed) for row, epoch in order])

    def later(self) -> "_Stream[S, B]":
        """All but the first batch."""
        return dataclasses.replace(self, start_step=self.start_step + 1, steps=self.steps - 1)


class Loader(Iterator[B]):
    """An endless (or ``steps`` long) iterator of batches; ``close`` it, or use it in ``with``, to stop its workers."""

    def __init__(self, iterator: Iterator[B]) -> None:
        self._iterator = iterator

    def __next__(self) -> B:
        return next(self._iterator)

    def close(self) -> None:
        """Stop worker processes and threads. May be called twice."""
        iterator, self._iterator = self._iterator, iter(())
        if hasattr(iterator, "close"):
            iterator.close()
        del iterator
        gc.collect()  # grain's iterators refer to themselves, and complain when they outlive their modules at exit

    def __enter__(self) -> "Loader[B]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(
    source: Source[S],
    collate: Callable[[Sequence[S]], B],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    shuffle: bool = True,
    steps: int | None = None,
) -> Loader[B]:
    """Iterate over batches of ``source``.

    Args:
        source: see ``Source``; it is pickled when there are workers.
        collate: a list of samples -> a batch; pickled with the source (by cloudpickle: a lambda will do).
        batch_size: samples per step over all hosts; this host yields ``batch_size / shard_count`` of them.
        seed, start_step: decide the order; the loader of a resumed run is the same call with ``start_step=step``.
        workers: processes that make batches (all but the first, which is made here while they start); 0 makes them in
            threads of this process.
        shard_index, shard_count: this host and the number of hosts (``jax.process_index()``, ``jax.process_count()``).
        shuffle: False visits the rows in order.
        steps: end after so many batches; None goes on for ever.

    Raises:
        ValueError: an empty source, or sizes that do not fit together. What ``source`` raises comes out of ``next``.
    """
    _check(len(source), batch_size, start_step, workers, shard_index, shard_count)
    local = batch_size // shard_count
    endless = (1 << 62) // batch_size
    length = endless if steps is None else steps
    stream = _Stream(source, collate, local, batch_size, shard_index, seed, shuffle, start_step, length)
    return Loader(_from_workers(stream, workers) if workers else _grain_iterator(stream, 0))


def _check(size: int, batch_size: int, start_step: int, workers: int, shard_index: int, shard_count: int) -> None:
    if size == 0:
        raise ValueError("The sample source is empty: no episode is left to train on.")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index must be in [0, shard_count={shard_count}); got {shard_index}.")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size must be a positive multiple of the number of hosts ({shard_count}); got {batch_size}.")
    if start_step < 0 or workers < 0:
        raise ValueError(f"start_step and workers must not be negative; got {start_step} and {workers}.")


def _from_workers(stream: _Stream[S, B], workers: int) -> Iterator[B]:
    """Processes take seconds to start: the first batch is made here, while they do."""
    if not len(stream):
        return
    with contextlib.closing(_grain_iterator(stream.later(), workers)) as later:
        if len(stream) > 1:
            later.start_prefetch()
        yield stream[0]
        if len(stream) > 1:
            yield from later


def _grain_iterator(stream: _Stream[S, B], workers: int) -> Any:
    import grain  # takes seconds: only when a loader is made
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its debug flags, and so insists, outside absl scripts too
    read_options = grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=0 if workers else 2)
    dataset: Any = grain.MapDataset.source(stream).to_iter_dataset(read_options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
        if not _has_shared_memory():
            pickled = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, pickled)
    return iter(dataset)


def _has_shared_memory() -> bool:
    """Containers have 64 MB of it unless told otherwise, and writing past its end kills the process."""
    folder = Path("/dev/shm")
    return not folder.is_dir() or shutil.disk_usage(folder).free > 1 << 30


def _init_worker(index: int, count: int) -> None:
    """Workers make NumPy samples: should anything in them touch JAX, it must not take the accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent tells nobody, and a worker would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
