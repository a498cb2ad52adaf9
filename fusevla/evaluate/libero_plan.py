"""Tasks of one object to be picked up and put somewhere, in the words of the published annotations, for those who know the truth.

The expert acts by it and the judge of thoughts compares with it; a policy never sees it.
"""

import dataclasses
import re
from typing import Final

from fusevla.evaluate.libero import Task

__all__ = ["PickAndPlace", "pick_and_place", "spoken"]

_SPOKEN: Final = re.compile(
    r"pick up the (?P<which>(?P<noun>.+?)(?: (?:between|next to|from|on|in|at) .+?)?) and (?:place|put) it (?P<where>.+)"
)
_GOAL: Final = re.compile(r"\(:goal\s*\(and\s*\((?P<relation>in|on) (?P<item>\S+) (?P<target>\S+?)\)\s*\)\s*\)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PickAndPlace:
    """``item`` has to get ``relation`` (in, on) ``target``, both by the simulator's names; ``plans`` says so in two steps."""

    item: str
    relation: str
    target: str
    noun: str
    """What the item is called."""
    plans: tuple[str, str]


def pick_and_place(task: Task) -> PickAndPlace | None:
    """The task's two sub-goals; None for tasks that are anything else."""
    said, goal = _SPOKEN.fullmatch(task.language), _GOAL.search(task.bddl_file.read_text(encoding="utf-8"))
    if said is None or goal is None:
        return None
    plans = f"pick up the {said['which']}", f"place the {said['noun']} {said['where']}"
    return PickAndPlace(goal["item"], goal["relation"].lower(), goal["target"], said["noun"], plans)


def spoken(name: str) -> str:
    """The simulator's name of an object as people say it: ``alphabet_soup_1`` is an alphabet soup."""
    return re.sub(r"_\d+$", "", name).replace("_", " ")
