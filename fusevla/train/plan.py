"""Which batch fits and which levers are enough, by measuring as few plans as possible.

``measure`` is a preset's ``Memory`` (fusevla.train.memory.planned_memory in earnest): expensive, and nearly a straight line in
the batch size.
"""

import dataclasses
from collections.abc import Callable, Sequence

from fusevla.presets import Preset
from fusevla.train.levers import Lever, divisors, levers
from fusevla.train.memory import Memory

Measure = Callable[[Preset], Memory]

MOST = 1024
"""No larger batch is looked for."""
GUESSES = 5
"""Sizes chosen by a straight line through those measured; halving takes over where memory does not grow like one."""


def largest_batch(measure: Callable[[int], int], limit: int, start: int, step: int = 1, most: int = MOST) -> int:
    """The largest multiple of ``step`` up to ``most`` for which ``measure`` gives at most ``limit`` bytes; 0 where none does.

    It was measured itself, and so was the next multiple (unless beyond ``most``). From ``start`` on, four measurements are
    enough for a straight line.
    """
    fits, over = 0, most // step + 1
    tried: dict[int, int] = {}
    guess = start // step
    while over - fits > 1:
        guess = min(max(guess, fits + 1), over - 1)
        tried[guess] = measure(guess * step)
        fits, over = (guess, over) if tried[guess] <= limit else (fits, guess)
        guess = _guess(tried, limit) if len(tried) < GUESSES else (fits + over) // 2
    return fits * step


def _guess(tried: dict[int, int], limit: int) -> int:
    """Where a line through the two sizes nearest to the limit meets it; twice or half of the only one."""
    size, *others = sorted(tried, key=lambda size: abs(tried[size] - limit))
    if not others or tried[size] == tried[others[0]]:
        return size * 2 if tried[size] <= limit else size // 2
    slope = (tried[others[0]] - tried[size]) / (others[0] - size)
    return int(size + (limit - tried[size]) // slope)


def with_batch(preset: Preset, size: int) -> Preset:
    """The preset with another batch."""
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, batch_size=size))


def try_sizes(preset: Preset, measure: Measure, limit: int, devices: int = 1) -> tuple[int, dict[int, Memory]]:
    """The largest batch that fits (0 where none does), and every size that was measured, the preset's among them."""
    size = preset.train.batch_size
    sizes = {size: measure(preset)}

    def total(size: int) -> int:
        sizes[size] = measure(with_batch(preset, size))
        return sizes[size].total

    return largest_batch(total, limit, size, devices * preset.train.accumulate), dict(sorted(sizes.items()))


def try_levers(preset: Preset, measure: Measure, limit: int, largest: int, devices: int = 1) -> list[tuple[Lever, Memory]]:
    """What every lever takes alone; of numbers to accumulate, those up to the first that is enough.

    ``largest`` is the largest batch that fits without: parts of more samples than that are not tried.
    """
    train = preset.train
    parts = divisors(train.batch_size // devices, train.accumulate)
    small = [number for number in parts if train.batch_size * train.accumulate <= largest * number]
    tried: list[tuple[Lever, Memory]] = []
    for lever in levers(preset, small or parts[-1:]):
        if lever.name == "accumulate" and any(lever.name == other.name and memory.total <= limit for other, memory in tried):
            continue
        tried.append((lever, measure(lever.pull(preset))))
    return tried


def try_together(
    preset: Preset, measure: Measure, limit: int, tried: Sequence[tuple[Lever, Memory]]
) -> tuple[list[Lever], Memory] | None:
    """The first levers, in order, that are enough together, else all; None where fewer than two save anything.

    Measured only from where the sum of what they save alone would be enough.
    """
    before = measure(preset).total
    saving = [(lever, before - memory.total) for lever, memory in tried if memory.total < before]
    chosen: dict[str, tuple[Lever, int]] = {}
    result = None
    for lever, saved in saving:
        chosen[lever.name] = (lever, saved)  # a stronger value takes the place of a weaker one
        promising = before - sum(saved for _, saved in chosen.values()) <= limit or lever is saving[-1][0]
        if len(chosen) < 2 or not promising:
            continue
        together = [other for other, _ in chosen.values()]
        result = together, measure(pull_all(preset, together))
        if result[1].total <= limit:
            break
    return result


def pull_all(preset: Preset, chosen: Sequence[Lever]) -> Preset:
    """The preset with every one of them."""
    for lever in chosen:
        preset = lever.pull(preset)
    return preset
