"""Weighted mixtures: exact shares, every set in its own complete epochs, and the loader's promises kept."""

import dataclasses
import itertools
import pickle
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusevla.data.loader import make_loader
from fusevla.data.mixture import Mixture, slots

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@dataclasses.dataclass(frozen=True)
class Named:
    """A source whose samples are (name, row, epoch, seed)."""

    name: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __call__(self, index: int, epoch: int, seed: int) -> tuple[str, int, int, int]:
        return self.name, index, epoch, seed


def mixture(sizes: Sequence[int], weights: Sequence[float] | None = None) -> Mixture[tuple[str, int, int, int]]:
    return Mixture([Named(chr(97 + i), size) for i, size in enumerate(sizes)], weights)


def batches(source: Mixture, count: int, **options) -> list[list[tuple[str, int, int, int]]]:
    with make_loader(source, list, seed=5, **({"batch_size": 4} | options)) as loader:
        return list(itertools.islice(loader, count))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10_000))
def test_slots_add_up_and_are_within_one_of_their_share(weights, size):
    got = slots(weights, size)
    assert sum(got) == size
    for count, weight in zip(got, weights, strict=True):
        assert abs(count - size * weight / sum(weights)) < 1 + 1e-6


def test_slots_by_hand():
    assert slots([1.0, 1.0], 3) == (2, 1)
    assert slots([3.0, 1.0], 8) == (6, 2)
    assert slots([0.5, 0.25, 0.25], 10) == (5, 3, 2)


@given(SIZES, st.integers(0, 100))
def test_without_weights_an_epoch_visits_every_sample_once(sizes, seed):
    source = mixture(sizes)
    for epoch in range(3):
        drawn = [source(i, epoch, seed) for i in range(len(source))]
        assert sorted((name, row) for name, row, _, _ in drawn) == [
            (chr(97 + i), row) for i, size in enumerate(sizes) for row in range(size)
        ]
        assert {e for _, _, e, _ in drawn} == {epoch}


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.3, 3)), min_size=1, max_size=3), st.integers(0, 100))
def test_every_set_runs_through_complete_epochs_of_its_own(sets, seed):
    sizes, weights = [size for size, _ in sets], [weight * size for size, weight in sets]
    assume(0 not in slots(weights, sum(sizes)))  # refused, see test_what_makes_no_mixture
    source = mixture(sizes, weights)
    drawn = [source(i, e, seed) for e in range(6) for i in range(len(source))]
    seen = Counter((name, row, epoch) for name, row, epoch, _ in drawn)
    assert set(seen.values()) == {1}, "no sample comes twice in an epoch of its set"
    for i, (size, _) in enumerate(sets):
        visits = 6 * source.slots[i]
        epochs = Counter(epoch for name, _, epoch in seen if name == chr(97 + i))
        assert epochs == Counter({e: min(size, visits - e * size) for e in range(-(-visits // size))})


def test_shares_are_those_of_the_weights_in_every_epoch_and_even_within_it():
    source = mixture([100, 300], [3.0, 1.0])
    got = batches(source, 200)
    epochs = [Counter(name for batch in got[i : i + 100] for name, *_ in batch) for i in (0, 100)]
    assert epochs == [Counter(a=300, b=100)] * 2
    parts = [Counter(name for batch in got[i : i + 20] for name, *_ in batch)["a"] for i in range(0, 100, 20)]
    assert all(45 <= part <= 75 for part in parts), "80 draws each, 60 expected, standard deviation below 4"


def test_sets_of_one_size_have_orders_and_seeds_of_their_own():
    source = mixture([20, 20])
    first, second = ([source(i, 0, 1) for i in range(start, start + 20)] for start in (0, 20))
    assert [row for _, row, _, _ in first] != [row for _, row, _, _ in second]
    assert {seed for *_, seed in first}.isdisjoint({seed for *_, seed in second})


@settings(max_examples=6)
@given(st.integers(0, 40))
def test_the_loader_resumes_a_mixture_from_the_step_alone(start):
    source = mixture([7, 5], [1.0, 2.0])
    assert batches(source, start + 3)[start:] == batches(source, 3, start_step=start)


def test_hosts_and_workers_change_nothing():
    source = mixture([7, 5, 9], [1.0, 2.0, 0.5])
    whole = batches(source, 6)
    parts = [batches(source, 6, shard_index=i, shard_count=2) for i in range(2)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert whole == batches(pickle.loads(pickle.dumps(source)), 6, workers=1)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], None, "at least one set"),
        ([3, 0], None, "set 1 of the mixture has no samples"),
        ([3, 4], [1.0], "one for each of the 2 sets expected, got 1"),
        ([3, 4], [1.0, 0.0], "positive numbers expected"),
        ([3, 4], [1.0, float("nan")], "positive numbers expected"),
        ([3, 4], [1.0, 1e-9], "set 1 would get none of the 7 samples"),
    ],
)
def test_what_makes_no_mixture(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mixture(sizes, weights)


def test_slots_outside_the_epoch():
    for index in (-1, 7):
        with pytest.raises(IndexError, match="of a mixture with 7"):
            mixture([3, 4])(index, 0, 0)
