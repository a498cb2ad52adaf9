"""Play unseen episodes with a trained policy and say what it is worth.

    python experiments/evaluate.py --preset toy --checkpoint runs/toy --episodes 200 --out runs/toy-evaluation

OUT gets report.json, report.html and films of some episodes with the thoughts written under them. Beside success it measures
whether thoughts are true, whether actions do what the thought says, and what happens when a wrong thought is put in its place.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from fusevla.evaluate.toy_rollout import Outcome
    from fusevla.policy.policy import Policy

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Args:
    """Closed-loop evaluation."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR|base")]
    """A run's folder (or the checkpoints folder in it); base: the toy's base weights before any fine-tuning."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the report goes; must be new or empty."""
    preset: Literal["toy"] = "toy"
    """The world to play in."""
    step: int | None = None
    """Which checkpoint; the latest by default."""
    episodes: int = 200
    """Unseen tables."""
    swaps: int = 100
    """Further episodes in which the first thought is made to name another block: all of its plan, and as many: its last line."""
    seed: int = 0
    """Of the tables and the noise of actions."""
    batch: int = 50
    """Episodes played at the same time."""
    films: int = 6
    """Episodes kept as films."""


def load(args: Args) -> "Policy":
    """The policy to be judged. Raises ``CheckpointError`` or ``FileNotFoundError``."""
    from fusevla.policy.load import load_base, load_policy
    from fusevla.policy.policy import policy_of
    from fusevla.train.material import make_toy_set
    from fusevla.train.request import Request, resolve

    if args.checkpoint == BASE:
        resolved = resolve(Request(args.preset))
        make_toy_set(Path(str(resolved.preset.data.data)))
        model, info = load_base(resolved)
    else:
        model, info = load_policy(args.checkpoint, args.step)
    if info.preset.name != args.preset:
        raise ValueError(f"--checkpoint: expected a policy of preset {args.preset}, got one of {info.preset.name}")
    return policy_of(model, info, batch_size=min(args.batch, args.episodes), max_new_tokens=info.preset.data.max_token_len)


def play_all(args: Args, policy: "Policy") -> tuple[list["Outcome"], dict[str, list["Outcome"]]]:
    """Undisturbed episodes, and those with a wrong first thought by what was wrong in it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fusevla.evaluate.toy_rollout import Swap, play

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    seeds = [args.seed * 1_000_003 + number for number in range(args.episodes)]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        one = bar.add_task("episodes", total=args.episodes)
        plain = play(policy, seeds, record=args.films, done=lambda count: bar.advance(one, count))
        kinds: tuple[Swap, ...] = ("plan", "due")
        two = bar.add_task("wrong thoughts", total=len(kinds) * min(args.swaps, args.episodes))
        advance = lambda count: bar.advance(two, count)
        swapped: dict[str, list[Outcome]] = {}
        for kind in kinds:
            swapped[kind] = play(policy, seeds[: args.swaps], swap=kind, done=advance)
    return plain, swapped


def report(args: Args, plain: list["Outcome"], swapped: dict[str, list["Outcome"]], began: float) -> dict[str, Any]:
    """Writes everything; returns the figures."""
    from fusevla.data.toy import FPS
    from fusevla.evaluate.closed_loop_report import write_page
    from fusevla.evaluate.film import write_film
    from fusevla.evaluate.toy_figures import summarize, swap_figures
    from fusevla.files import write_whole

    wrong, wrong_due = (swap_figures(swapped[kind]) for kind in ("plan", "due"))
    figures = {
        **summarize(plain),
        "wrong_thought_success": wrong["success"],
        "wrong_thought": wrong,
        "wrong_last_line": wrong_due,
    }
    films = {f"episode_{outcome.seed}.mp4": outcome for outcome in plain if outcome.frames}
    for name, outcome in films.items():
        write_film(args.out / name, outcome.frames, FPS)
    write_page(args.out / "report.html", f"{args.preset}: {args.checkpoint}", figures, films, plain)
    episodes = [
        {"seed": o.seed, "task": o.task, "success": o.success, "steps": o.steps, "thoughts": [t.text for t in o.thoughts]}
        for o in plain
    ]
    settings = {
        "checkpoint": args.checkpoint,
        "step": args.step,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    document = {**figures, **settings, "results": episodes}
    write_whole(args.out / "report.json", (json.dumps(document, indent=1) + "\n").encode())
    return figures


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    problems = [
        f"--{name}: expected at least 1, got {value}" for name in ("episodes", "batch") if (value := getattr(args, name)) < 1
    ]
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        problems.append(f"--out: {args.out} exists and is not empty; name another folder, or remove it")
    if problems:
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
        sys.exit(2)
    began = time.perf_counter()
    try:
        policy = load(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    figures = report(args, *play_all(args, policy), began)
    low, high = figures["success_interval"]
    print(f"success {figures['success']:.1%} of {figures['episodes']} episodes (95% interval {low:.1%} to {high:.1%})")
    for name in ("thought_accuracy", "faithfulness", "decisions", "wrong_thought", "wrong_last_line", "per_task"):
        print(f"{name}: {figures[name]}")
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
