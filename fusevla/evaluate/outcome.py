"""What is kept of a closed-loop episode, and its line in a journal."""

import dataclasses
import json
from collections import Counter
from typing import Any, Literal

import numpy as np

from fusevla.arrays import UInt8

__all__ = ["Outcome", "Swap", "ThoughtRecord", "Ticket", "from_line", "to_line"]

Swap = Literal["plan", "due"]
"""What of a thought is made to name another thing: the whole plan, or only its last line, which then contradicts the plan."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """An episode to be played: what ``key`` means is the world's own matter (a seed; a task and an initial state)."""

    key: tuple[int, ...]
    swap: Swap | None = None
    """Make the first thought name another thing."""
    record: bool = False
    """Keep what was seen."""

    @property
    def name(self) -> str:
        """Of its film: numbers, and the swap where there is one."""
        return "_".join(["episode", *map(str, self.key), *([self.swap] if self.swap else [])])


@dataclasses.dataclass(frozen=True)
class ThoughtRecord:
    """A thought, and whether it was right when it was written (None where nobody knows)."""

    step: int
    text: str
    right: bool | None
    """It names the sub-goal that is due."""
    exact: bool | None
    """All of it is what the annotation would say."""


@dataclasses.dataclass
class Outcome:
    """One episode. ``decisions`` counts (what was due, what was done); ``grasps`` lists (taken, what the thought named)."""

    ticket: Ticket
    task: str = ""
    group: str = ""
    """What it is counted under."""
    success: bool = False
    steps: int = 0
    wanted: str | None = None
    """The thing that has to be taken first."""
    thoughts: list[ThoughtRecord] = dataclasses.field(default_factory=list)
    decisions: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    grasps: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    malformed: int = 0
    swapped_to: str | None = None
    """The thing that the first thought was made to name in place of its own."""
    frames: list[tuple[UInt8[np.ndarray, "h w 3"], str]] = dataclasses.field(default_factory=list)
    """What was seen, with the thought at the time; of recorded episodes."""
    film: str | None = None
    """The file that shows it."""


def to_line(outcome: Outcome) -> str:
    """One line of JSON, without the frames."""
    values = dataclasses.asdict(dataclasses.replace(outcome, frames=[], decisions=Counter()))
    del values["frames"]
    return json.dumps(values | {"decisions": [[*pair, count] for pair, count in outcome.decisions.items()]})


def from_line(line: str) -> Outcome:
    """The inverse of ``to_line``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` where it is no such line."""
    values: dict[str, Any] = json.loads(line)
    ticket = values.pop("ticket")
    return Outcome(
        ticket=Ticket(tuple(ticket["key"]), ticket["swap"], ticket["record"]),
        thoughts=[ThoughtRecord(**thought) for thought in values.pop("thoughts")],
        decisions=Counter({(due, did): count for due, did, count in values.pop("decisions")}),
        grasps=[(taken, named) for taken, named in values.pop("grasps")],
        **values,
    )
