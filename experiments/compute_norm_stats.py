"""Normalisation statistics of a LeRobot set, in openpi's norm_stats.json.

    python experiments/compute_norm_stats.py --data DIR --out DIR/norm_stats.json
    python experiments/compute_norm_stats.py --data DIR --out norm_stats.json --held-out 0.1

Exact means, standard deviations and 1% and 99% quantiles of state and actions, from those two columns alone: no image is
read. train.py takes the file with --norm FILE, and by itself where it lies in the set's folder. Without one it computes the
same over its training episodes: --held-out with train.py's value (0.1 in the libero presets) gives exactly those numbers.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from fusevla.data.normalize import NormStats


@dataclasses.dataclass(frozen=True)
class Args:
    """Compute norm_stats.json of a set."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A LeRobot folder (v2.0, v2.1 or v3.0)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write (replaced where it exists), or a folder for norm_stats.json."""
    held_out: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.0
    """Share of the episodes to leave out, chosen as train.py chooses those for validation; 0 takes every frame."""
    columns: Annotated[tuple[tuple[str, str], ...], tyro.conf.arg(metavar="NAME COLUMN")] = ()
    """Which column is what, where that is not recognised: --columns state observation.pose actions action.delta."""


def run(args: Args) -> dict[str, "NormStats"]:
    """Reads, computes, writes and reports. Raises what those raise on bad input."""
    from fusevla.data.batch import split_episodes
    from fusevla.data.lerobot import open_set
    from fusevla.data.normalize import compute_norm_stats, save_norm_stats

    started = time.perf_counter()
    frames = open_set(args.data, args.columns, cameras=())
    used, held_out = split_episodes(frames.episodes, args.held_out)
    opened = time.perf_counter()
    stats = compute_norm_stats(frames, used)
    done = time.perf_counter()
    path = save_norm_stats(args.out, stats)
    count = sum(frames.episodes[i].length for i in used)
    print(f"{frames!r}: {count:,} frames of {len(used):,} episodes used, {len(held_out):,} held out")
    for key, entry in stats.items():
        print("\n".join(describe(key, entry)))
    print(f"read in {opened - started:.2f} s, computed in {done - opened:.2f} s; written to {path}")
    return stats


def describe(key: str, stats: "NormStats") -> list[str]:
    """A table, then one line for each dimension whose spread says nothing about scale."""
    from fusevla.data.normalize import FIELDS, degenerate

    lines = [f"{key:<8}" + "".join(f"{field:>12}" for field in FIELDS)]
    columns = [getattr(stats, field) for field in FIELDS]
    lines += [f"{i:>8}" + "".join(f"{value:>12.5g}" for value in row) for i, row in enumerate(zip(*columns, strict=True))]
    for i, is_degenerate in enumerate(degenerate(stats)):
        if is_degenerate:
            what = "constant" if stats.std[i] == 0 else "constant in 98% of the frames or more"
            lines.append(f"{key} {i} is {what}: training clips it to [-1, 1] instead of dividing by its spread")
    return lines


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        run(args)
    except (ValueError, OSError) as error:  # LeRobotError, which lists every defect, is a ValueError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
