"""Collect demonstrations in the LIBERO simulator: a scripted expert that sees everything, filmed with its thoughts.

    python experiments/collect_libero.py --suite object --tasks 0,1 --episodes 50 --first-init 0 --last-init 39 --out data/mine
    python experiments/train.py --preset libero10 --data data/mine

The expert picks and places: it knows libero_object, and libero_spatial but for the bowl in the drawer. OUT becomes a LeRobot
v2.1 folder with cot_simple.json and norm_stats.json; contact_sheet.png and a film of each task are for people to look at.
Every try is kept beside OUT, in OUT.tries, until OUT is complete: the same command again goes on where it was interrupted.
The hand does not quite do what it is told, and the actions kept are what the expert would do about it: played back they
lead elsewhere. Needs the extra libero.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from fusevla.data.annotations import Annotations
    from fusevla.data.lerobot import LeRobotSet
    from fusevla.evaluate.libero import Task
    from fusevla.evaluate.libero_collect import Order


@dataclasses.dataclass(frozen=True)
class Args:
    """Collect demonstrations."""

    suite: str
    """libero_object, libero_spatial; object and spatial are the same."""
    tasks: Annotated[str, tyro.conf.arg(metavar="0,1")]
    """Numbers of tasks in the suite."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the set goes; must be new or empty."""
    episodes: int = 50
    """Successful episodes of each task; where they are more than initial states, these are used again in other ways."""
    first_init: int = 0
    """The first initial state to start from."""
    last_init: int | None = None
    """The last one; by default as many states as episodes, or as there are. Evaluate on others."""
    seed: int = 0
    """Of what differs between demonstrations."""
    workers: int = 1
    """Simulators at work at the same time; about 2 GB of memory each."""
    assets: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """LIBERO's scenes, objects and textures; by default where its package expects them."""


class RefusedError(ValueError):
    """What was asked for cannot be done."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        tasks, order = check(args)
    except (ValueError, ModuleNotFoundError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        tried = gather(tasks, order)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; what was done is kept in {order.folder}, and the same command goes on from there")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}; what was done is kept in {order.folder}, and the same command goes on from there")
    print_table(tasks, order, tried)
    if short := [task.index for task in tasks if tried[task, True] < order.episodes]:
        remedy = f"the same command without them writes the others, whose successes are kept in {order.folder}"
        sys.exit(f"error: given up on tasks {short} after {order.most_tries} tries each; {remedy}")
    write(args, tasks, order)
    shutil.rmtree(order.folder)
    print(f"{args.out}: {order.episodes * len(tasks)} episodes; look at {args.out / 'contact_sheet.png'}")


def check(args: Args) -> tuple[list["Task"], "Order"]:
    """What is to be done. ``RefusedError`` or what the simulator lacks, before anything long begins."""
    from fusevla.evaluate import libero
    from fusevla.evaluate.libero_collect import Order
    from fusevla.evaluate.libero_init import read_init_states

    out = args.out.expanduser().absolute()
    for name in ("episodes", "workers"):
        if getattr(args, name) < 1:
            raise RefusedError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RefusedError(f"--out: {out} exists and is not empty; name another folder, or remove it")
    tasks = choose(args.tasks, libero.tasks(args.suite))
    count = min(len(read_init_states(task.init_file)) for task in tasks)
    last = args.last_init if args.last_init is not None else min(args.first_init + args.episodes, count) - 1
    if not 0 <= args.first_init <= last < count:
        raise RefusedError(
            f"--first-init, --last-init: expected 0 <= first <= last <= {count - 1}, got {args.first_init}, {last}"
        )
    libero.LiberoEnv(tasks[0], cameras=False, assets=args.assets)  # says what is missing
    inits, kept = range(args.first_init, last + 1), out.with_name(f"{out.name}.tries")
    settings = {"suite": tasks[0].suite, "inits": [inits.start, inits.stop], "seed": args.seed}
    same_settings(kept / "settings.json", settings)
    return tasks, Order(args.episodes, inits, args.seed, kept, args.assets, args.workers)


def choose(text: str, available: list["Task"]) -> list["Task"]:
    """The tasks that are meant. ``RefusedError`` for numbers that are none, and for tasks that the expert cannot do."""
    from fusevla.evaluate.libero_expert import grip_of
    from fusevla.evaluate.libero_plan import pick_and_place

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < len(available) for part in parts) or len(set(parts)) < len(parts):
        raise RefusedError(f"--tasks: expected different numbers from 0 to {len(available) - 1} such as 0,1, got {text!r}")
    tasks = [available[int(part)] for part in parts]
    for task in tasks:
        plan = pick_and_place(task)
        if plan is None or grip_of(plan.item) is None:
            raise RefusedError(
                f"--tasks: the expert only picks and places what it knows how to grip; {task.index} is {task.language!r}"
            )
    return tasks


def same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Notes what the tries are made with. ``RefusedError`` where there are some made in another way."""
    from fusevla.files import write_whole

    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if found != settings:
        raise RefusedError(
            f"{path.parent} holds tries made with {found}, asked for are {settings}; remove it, or ask for the same"
        )
    write_whole(path, json.dumps(settings).encode())


def gather(tasks: list["Task"], order: "Order") -> "Counter[tuple[Task, bool]]":
    """Makes the tries, with progress; counts them by task and success."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fusevla.evaluate.libero_collect import Try, collect

    tried: Counter[tuple[Task, bool]] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("episodes", total=order.episodes * len(tasks))

        def done(attempt: Try, success: bool) -> None:
            tried[attempt.task, success] += 1
            bar.advance(line, success)
            failed = sum(count for (_, good), count in tried.items() if not good)
            rate = f", {60 * speed:.1f} per minute" if (speed := bar.tasks[0].speed) else ""
            bar.update(line, description=f"episodes ({failed} tries failed{rate})")

        collect(order, tasks, done)
    return tried


def print_table(tasks: list["Task"], order: "Order", tried: "Counter[tuple[Task, bool]]") -> None:
    """How often the expert succeeded."""
    print(f"initial states {order.inits.start} to {order.inits.stop - 1}; successes of tries:")
    for task in tasks:
        good, bad = tried[task, True], tried[task, False]
        print(f"  {task.suite} {task.index}: {good} of {good + bad} ({good / max(1, good + bad):.0%})  {task.language}")


def write(args: Args, tasks: list["Task"], order: "Order") -> None:
    """The set, which appears when it is complete."""
    from fusevla.data.annotations import load_annotations
    from fusevla.data.contact_sheet import draw_contact_sheet
    from fusevla.data.lerobot import open_set, write_lerobot_v21
    from fusevla.data.lerobot_write import EpisodeFrames
    from fusevla.data.normalize import compute_norm_stats, save_norm_stats
    from fusevla.evaluate.libero_collect import successes
    from fusevla.evaluate.libero_demos import FPS, annotation
    from fusevla.evaluate.libero_plan import pick_and_place

    out = args.out.expanduser().absolute()
    records: dict[str, Any] = {"vision_language_episode_idx": []}

    def stream() -> Iterator[EpisodeFrames]:
        for task, take in successes(order, tasks):
            plan = pick_and_place(task)
            assert plan is not None
            records[str(len(records) - 1)] = annotation(plan, take)
            yield take.frames

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = write_lerobot_v21(Path(scratch) / "set", stream(), fps=FPS, image_format="jpeg")
        (made / "cot_simple.json").write_text(json.dumps(records), encoding="utf-8")
        frames, thoughts = open_set(made), load_annotations(made / "cot_simple.json")
        save_norm_stats(made, compute_norm_stats(frames))
        draw_contact_sheet(made / "contact_sheet.png", frames, range(len(frames.episodes)), thoughts)
        films(made, frames, thoughts)
        made.replace(out)


def films(folder: Path, frames: "LeRobotSet", thoughts: "Annotations") -> None:
    """The first episode of every task from both cameras, the latest thought written under it."""
    import numpy as np

    from fusevla.evaluate.film import write_film

    firsts = {episode.task: i for i, episode in reversed(list(enumerate(frames.episodes)))}
    for i in sorted(firsts.values()):
        episode, rows = frames.episodes[i], frames.episode_slice(i)
        pages = []
        for frame in range(episode.length):
            segment = thoughts.episodes[episode.index].segment_at(frame, episode.length)
            views = [frames.image(camera, rows.start + frame) for camera in frames.cameras]
            pages.append((np.concatenate(views, axis=1), segment.updated_content or segment.content))
        write_film(folder / f"episode_{episode.index:06d}.mp4", pages, round(frames.fps))


if __name__ == "__main__":
    main()
