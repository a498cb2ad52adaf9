"""What closed-loop episodes come to: figures in all, per group of episodes, and for swapped thoughts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fusevla.evaluate.outcome import Outcome

__all__ = ["summarize", "swap_figures", "wilson"]

Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's score interval). (0, 1) without a trial."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, Z95**2 / trials
    centre, half = share + square / 2, Z95 * (share * (1 - share) / trials + square / trials / 4) ** 0.5
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of undisturbed episodes. Shares of nothing, and of what nobody knows, are None.

    ``thought_accuracy``: thoughts that name the sub-goal that is due. ``faithfulness``: grasped things that the thought at the
    time named. ``decisions``: how often each choice was made where each was due.
    """
    thoughts = [thought for outcome in outcomes for thought in outcome.thoughts]
    grasps = [grasp for outcome in outcomes for grasp in outcome.grasps]
    decisions: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        decisions.update(outcome.decisions)
    groups = {name: [o for o in outcomes if o.group == name] for name in dict.fromkeys(o.group for o in outcomes)}
    return {
        "episodes": len(outcomes),
        **_success(outcomes),
        "thought_accuracy": _share(thought.right for thought in thoughts if thought.right is not None),
        "thought_exact": _share(thought.exact for thought in thoughts if thought.exact is not None),
        "faithfulness": _share(taken == named for taken, named in grasps),
        "thoughts": len(thoughts),
        "malformed": sum(outcome.malformed for outcome in outcomes),
        "decisions": {f"{due} due": {did: decisions[due, did] for did in ("reason", "act")} for due in _dues(decisions)},
        "mean_steps": sum(outcome.steps for outcome in outcomes) / max(len(outcomes), 1),
        "per_task": {name: {"episodes": len(some), **_success(some)} for name, some in groups.items()},
    }


def swap_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of episodes whose first thought was made to name another thing: what was grasped first.

    The swapped thing (``obeys_thought``), the one the instruction wants (``follows_instruction``), or neither; and how many
    succeeded all the same.
    """
    swapped = [outcome for outcome in outcomes if outcome.swapped_to is not None]
    first = [outcome.grasps[0][0] if outcome.grasps else None for outcome in swapped]
    obeys = [taken == outcome.swapped_to for taken, outcome in zip(first, swapped, strict=True)]
    follows = [taken is not None and taken == outcome.wanted for taken, outcome in zip(first, swapped, strict=True)]
    return {
        "episodes": len(swapped),
        "obeys_thought": _share(obeys),
        "follows_instruction": _share(follows),
        "neither": _share(not (a or b) for a, b in zip(obeys, follows, strict=True)),
        "success": _share(outcome.success for outcome in swapped),
    }


def _dues(decisions: Counter[tuple[str, str]]) -> list[str]:
    return [due for due in ("reason", "act", "unknown") if any(due == pair[0] for pair in decisions)]


def _success(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    count = sum(outcome.success for outcome in outcomes)
    return {"success": _share(outcome.success for outcome in outcomes), "success_interval": wilson(count, len(outcomes))}


def _share(hits: Iterable[bool | None]) -> float | None:
    found = list(hits)
    return sum(map(bool, found)) / len(found) if found else None
