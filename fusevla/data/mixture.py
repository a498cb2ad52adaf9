"""Several sets as one source of samples, each with a weight.

One epoch of a mixture has a fixed number of slots for every set, as near to the weights as whole numbers can be; the loader's
shuffle spreads them. Every set is visited in its own seeded order, each of its samples once before any comes again, however
often that is in an epoch of the mixture. All of it is a function of (index, epoch, seed): order, resuming, workers and hosts
are the loader's business, as with a single set.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from fusevla.data.loader import Source, global_order

__all__ = ["Mixture", "slots"]

S = TypeVar("S")


def slots(weights: Sequence[float], size: int) -> tuple[int, ...]:
    """``size`` split in proportion to ``weights``: whole numbers that add up to it, none further than 1 from its share.

    What rounding down leaves goes to the largest remainders, the first of equals.
    """
    shares = size * np.asarray(weights, np.float64) / np.sum(weights)
    whole = np.floor(shares).astype(int)
    first = np.argsort(whole - shares, kind="stable")[: size - int(whole.sum())]
    whole[first] += 1
    return tuple(whole.tolist())


class Mixture(Generic[S]):
    """A ``Source`` that draws from ``sources`` in proportion to ``weights``; picklable where they are.

    ``len`` is the number of samples of all sets together: an epoch is as long as theirs, whatever the weights.
    """

    def __init__(self, sources: Sequence[Source[S]], weights: Sequence[float] | None = None) -> None:
        """Mixes ``sources``; without ``weights`` every sample of every set is as likely (an epoch visits each once).

        Raises:
            ValueError: no source, an empty one, another number of weights, a weight that is not positive and finite, or one so
                small that its set would have no slot in an epoch.
        """
        sizes = [len(source) for source in sources]
        weights = [float(size) for size in sizes] if weights is None else list(weights)
        _check(sizes, weights)
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.slots = slots(weights, sum(sizes))
        if 0 in self.slots:
            where = self.slots.index(0)
            few = f"set {where} would get none of the {sum(sizes)} samples of an epoch"
            raise ValueError(f"weights: {few}; raise its weight, {weights[where]:g}")
        self._starts = np.cumsum([0, *self.slots])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(self, index: int, epoch: int, seed: int) -> S:
        """The sample in slot ``index`` of ``epoch``. IndexError when there is no such slot."""
        which, row, its_epoch = self.locate(index, epoch, seed)
        return self.sources[which](row, its_epoch, _seed(seed, which))

    def locate(self, index: int, epoch: int, seed: int) -> tuple[int, int, int]:
        """(set, its sample, its own epoch) of a slot. IndexError when there is no such slot."""
        if not 0 <= index < len(self):
            raise IndexError(f"slot {index} of a mixture with {len(self)}")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        visit = epoch * self.slots[which] + index - int(self._starts[which])
        return which, *global_order(visit, len(self.sources[which]), _seed(seed, which))


def _seed(seed: int, which: int) -> int:
    """Sets of one size must not go through one order, nor share their draws."""
    return int(np.random.SeedSequence([seed, which]).generate_state(1, np.uint64)[0])


def _check(sizes: Sequence[int], weights: Sequence[float]) -> None:
    if not sizes:
        raise ValueError("A mixture needs at least one set.")
    if 0 in sizes:
        raise ValueError(f"set {sizes.index(0)} of the mixture has no samples.")
    if len(weights) != len(sizes):
        raise ValueError(f"weights: one for each of the {len(sizes)} sets expected, got {len(weights)}")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights: positive numbers expected, got {list(weights)}; leave out a set that is not wanted")
