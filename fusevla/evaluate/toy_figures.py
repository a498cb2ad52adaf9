"""What closed-loop episodes in the toy world come to: figures, per kind of task and for swapped thoughts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fusevla.data.toy import RELATIONS
from fusevla.evaluate.toy_rollout import Outcome

__all__ = ["relation_of", "summarize", "swap_figures", "wilson"]

Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's score interval). (0, 1) without a trial."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, Z95**2 / trials
    centre, half = share + square / 2, Z95 * (share * (1 - share) / trials + square / trials / 4) ** 0.5
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def relation_of(task: str) -> str:
    """Which of ``RELATIONS`` an instruction has."""
    return next((name for name, (phrase, *_) in RELATIONS.items() if phrase and task.endswith(phrase)), "open")


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of undisturbed episodes. Shares of nothing are None.

    ``thought_accuracy``: thoughts that name the sub-goal that is due. ``faithfulness``: grasped blocks that the thought at the
    time named. ``decisions``: how often each choice was made where each was due.
    """
    thoughts = [thought for outcome in outcomes for thought in outcome.thoughts]
    grasps = [grasp for outcome in outcomes for grasp in outcome.grasps]
    decisions: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        decisions.update(outcome.decisions)
    relations = {name: [o for o in outcomes if relation_of(o.task) == name] for name in RELATIONS}
    return {
        "episodes": len(outcomes),
        **_success(outcomes),
        "thought_accuracy": _share(thought.right for thought in thoughts),
        "thought_exact": _share(thought.exact for thought in thoughts),
        "faithfulness": _share(taken == named for taken, named in grasps),
        "thoughts": len(thoughts),
        "malformed": sum(outcome.malformed for outcome in outcomes),
        "decisions": {f"{due} due": {did: decisions[due, did] for did in ("reason", "act")} for due in ("reason", "act")},
        "mean_steps": sum(outcome.steps for outcome in outcomes) / max(len(outcomes), 1),
        "per_task": {name: {"episodes": len(some), **_success(some)} for name, some in relations.items()},
    }


def swap_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of episodes whose first thought was made to name another block: what was grasped first.

    The swapped block (``obeys_thought``), the one the instruction wants (``follows_instruction``), or neither; and how many
    succeeded all the same.
    """
    swapped = [outcome for outcome in outcomes if outcome.swapped_to is not None]
    first = [outcome.grasps[0][0] if outcome.grasps else None for outcome in swapped]
    obeys = [taken == outcome.swapped_to for taken, outcome in zip(first, swapped, strict=True)]
    follows = [taken == outcome.plans[0] for taken, outcome in zip(first, swapped, strict=True)]
    return {
        "episodes": len(swapped),
        "obeys_thought": _share(obeys),
        "follows_instruction": _share(follows),
        "neither": _share(not (a or b) for a, b in zip(obeys, follows, strict=True)),
        "success": _share(outcome.success for outcome in swapped),
    }


def _success(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    count = sum(outcome.success for outcome in outcomes)
    return {"success": _share(outcome.success for outcome in outcomes), "success_interval": wilson(count, len(outcomes))}


def _share(hits: Any) -> float | None:
    found = list(hits)
    return sum(found) / len(found) if found else None
