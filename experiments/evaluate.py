"""Play unseen episodes with a trained policy and say what it is worth: in the toy world, or in the LIBERO simulator.

    python experiments/evaluate.py --preset toy --checkpoint runs/toy --episodes 200 --out runs/toy-evaluation
    python experiments/evaluate.py --suite libero_object --checkpoint runs/libero --episodes 50 --out runs/libero-evaluation

OUT gets report.json, report.html, pictures, and films of some episodes with the thoughts written under them. Beside success it
measures, where the truth is known, whether thoughts are true, whether actions do what the thought says, and what happens when a
wrong thought is put in its place. Interrupted, the same command goes on where it stopped.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from fusevla.evaluate.closed_loop import Job
    from fusevla.evaluate.outcome import Outcome
    from fusevla.policy.policy import Policy

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Args:
    """Closed-loop evaluation."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR|base")]
    """A run's folder (or the checkpoints folder in it); base: the toy's base weights before any fine-tuning."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the report goes: new, empty, or an evaluation to go on with."""
    preset: Literal["toy"] = "toy"
    """The embedded world to play in, unless a suite is named."""
    suite: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """libero_object, libero_spatial, libero_goal, libero_10 or libero_90 (with or without libero_); needs the extra libero."""
    step: int | None = None
    """Which checkpoint; the latest by default."""
    episodes: int | None = None
    """Unseen tables (200); of a suite: initial states of each task (50)."""
    swaps: int | None = None
    """Further episodes in which the first thought is made to name another thing: all of its plan, and as many: its last line.
    Tables (100); of a suite: initial states of each task that is to pick one thing up (0)."""
    curve: int = 0
    """So many of the episodes with each older checkpoint that was kept, and with the toy's base: success over training."""
    seed: int = 0
    """Of the tables and the noise of actions."""
    batch: int | None = None
    """Episodes played at the same time: 50 tables, or a simulator (2 GB of memory) for each CPU core."""
    films: int | None = None
    """Episodes kept as films: 6 tables, or 1 of each task."""
    tasks: Annotated[str | None, tyro.conf.arg(metavar="I,J,...")] = None
    """Of the suite; all by default."""
    first_init: int = 0
    """Of the suite: the first initial state."""
    assets: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Of the simulator; by default where its package has them."""


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def problems(args: Args) -> list[str]:
    """What is wrong with the options themselves."""
    least = {"episodes": 1, "batch": 1, "swaps": 0, "curve": 0, "films": 0, "first_init": 0}
    values = {name: getattr(args, name) for name in least}
    found = [
        f"--{name.replace('_', '-')}: expected at least {least[name]}, got {value}"
        for name, value in values.items()
        if value is not None and value < least[name]
    ]
    if args.suite is not None and args.checkpoint == BASE:
        found.append("--checkpoint base: only the toy has one in the package; give the folder of a run")
    if args.tasks is not None and not all(part.strip().isdigit() for part in args.tasks.split(",")):
        found.append(f"--tasks: expected numbers with commas between them, got {args.tasks!r}")
    return found


def job_of(args: Args) -> "Job":
    """What is to be played. Raises what ``libero_job`` raises."""
    from fusevla.evaluate.closed_loop import libero_job, toy_job

    if args.suite is None:
        return toy_job(_or(args.episodes, 200), _or(args.swaps, 100), _or(args.films, 6), args.seed)
    return libero_job(
        args.suite,
        None if args.tasks is None else [int(part) for part in args.tasks.split(",")],
        first_init=args.first_init,
        episodes=_or(args.episodes, 50),
        swaps=_or(args.swaps, 0),
        films=_or(args.films, 1),
        seed=args.seed,
        assets=args.assets,
    )


def load(args: Args, job: "Job", step: int | None) -> "Policy":
    """The policy of a checkpoint, or of the toy's base for step None. Raises ``ValueError`` or ``FileNotFoundError``."""
    from fusevla.compile_cache import use_compile_cache
    from fusevla.policy.load import load_base, load_policy
    from fusevla.policy.policy import policy_of
    from fusevla.train.material import make_toy_set
    from fusevla.train.request import Request, resolve

    if step is None:
        resolved = resolve(Request("toy"))
        make_toy_set(Path(str(resolved.preset.data.data)))
        model, info = load_base(resolved)
    else:
        model, info = load_policy(args.checkpoint, step)
    use_compile_cache()
    batch = min(_or(args.batch, 50 if args.suite is None else os.cpu_count() or 1), len(job.tickets))
    policy = policy_of(model, info, batch_size=batch)
    known = None if policy.stats is None else (len(policy.stats["state"].mean), len(policy.stats["actions"].mean))
    if known not in (None, (job.state_dim, job.action_dim)):
        raise ValueError(
            f"--checkpoint: expected a policy for {job.name} (state of {job.state_dim}, actions of {job.action_dim}), "
            f"got one of preset {info.preset.name} (state of {known[0]}, actions of {known[1]})"
        )
    return policy


def steps_of(args: Args) -> list[int | None]:
    """The checkpoint that is judged, last, and before it those for the curve; None is the toy's base.

    Raises:
        ValueError: no such checkpoint.
    """
    from fusevla.policy.load import checkpoints_folder
    from fusevla.train.checkpoint import complete_steps, read_info

    if args.checkpoint == BASE:
        return [None]
    folder = checkpoints_folder(args.checkpoint)
    read_info(folder, args.step)
    kept = complete_steps(folder)
    judged = kept[-1] if args.step is None else args.step
    return [*([None] if args.suite is None else []), *(step for step in kept if step < judged), judged]


def evaluate(args: Args, job: "Job", steps: list[int | None]) -> dict[str, Any]:
    """Plays all there is to play and writes the report; the figures."""
    from fusevla.evaluate.closed_loop import open_journal, play_all
    from fusevla.evaluate.figures import summarize, swap_figures

    checkpoint = BASE if args.checkpoint == BASE else str(Path(args.checkpoint).expanduser().absolute())
    journal = open_journal(job, args.out, {"checkpoint": checkpoint, "step": steps[-1]})
    outcomes = play_all(job, load(args, job, steps[-1]), journal)
    plain = [outcome for outcome in outcomes if outcome.ticket.swap is None]
    points = [(steps[-1], plain)]
    few = dataclasses.replace(job, tickets=tuple(dataclasses.replace(t, record=False) for t in job.tickets[: args.curve]))
    for step in reversed(steps[:-1] if args.curve else []):
        older = open_journal(few, args.out / f"step_{step or 0}", {"checkpoint": checkpoint, "step": step})
        points.append((step, play_all(few, load(args, few, step), older)))
    wrong, wrong_due = (swap_figures([o for o in outcomes if o.ticket.swap == kind]) for kind in ("plan", "due"))
    kept = ("episodes", "success", "success_interval", "thought_accuracy", "faithfulness")
    figures = {
        **summarize(plain),
        "wrong_thought_success": wrong["success"],
        "wrong_thought": wrong,
        "wrong_last_line": wrong_due,
        "curve": [{"step": step or 0} | {name: summarize(o)[name] for name in kept} for step, o in reversed(points)],
    }
    settings = {"world": job.name, "checkpoint": checkpoint, "step": steps[-1], "seed": args.seed}
    report(args, job, settings, figures, outcomes)
    return figures


def report(args: Args, job: "Job", settings: dict[str, Any], figures: dict[str, Any], outcomes: list["Outcome"]) -> None:
    """report.json, report.html and the pictures."""
    from fusevla.evaluate.closed_loop_report import plot_curve, plot_tasks, write_page
    from fusevla.evaluate.outcome import to_line
    from fusevla.files import write_whole

    pictures = ["success_per_task.png"]
    plot_tasks(figures, args.out / pictures[0])
    if len(figures["curve"]) > 1:
        pictures.append("success_curve.png")
        plot_curve(figures["curve"], args.out / pictures[1])
    write_page(args.out / "report.html", f"{job.name}: {args.checkpoint}", figures, outcomes, pictures)
    results = [json.loads(to_line(outcome)) for outcome in outcomes if outcome.ticket.swap is None]
    write_whole(args.out / "report.json", (json.dumps({**figures, **settings, "results": results}, indent=1) + "\n").encode())


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    found, began = problems(args), time.perf_counter()
    try:
        if found:
            raise ValueError("; ".join(found))
        figures = evaluate(args, job_of(args), steps_of(args))
    except (ValueError, FileNotFoundError, ModuleNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what {args.out} holds", file=sys.stderr)
        sys.exit(130)
    low, high = figures["success_interval"]
    print(f"success {figures['success']:.1%} of {figures['episodes']} episodes (95% interval {low:.1%} to {high:.1%})")
    for name in ("thought_accuracy", "faithfulness", "decisions", "wrong_thought", "wrong_last_line", "per_task"):
        print(f"{name}: {figures[name]}")
    print(f"report after {time.perf_counter() - began:.0f} s: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
