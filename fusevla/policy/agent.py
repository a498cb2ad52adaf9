"""The think/act state machine as a value: evaluation and server keep one ``Agent`` per episode or connection.

The first query is made to think; the new thought replaces the old one in the prompt (instruction + latest thought) and the next
query decides again; after ``MAX_THOUGHTS`` in a row it acts. Source: DESIGN section 8. Nothing here knows of a model.
"""

import dataclasses
from typing import Final, Literal

import numpy as np

from fusevla.arrays import Float
from fusevla.data.prompts import initial_content, parse_thought, with_instruction

__all__ = ["MAX_THOUGHTS", "Agent", "Choice"]

Choice = Literal["reason", "act"]
MAX_THOUGHTS: Final = 10


@dataclasses.dataclass(frozen=True)
class Agent:
    """What is remembered between queries; never changed in place."""

    task: str
    thought: str | None = None
    """The latest thought, as the model wrote it."""
    in_a_row: int = 0
    """Thoughts since the last action."""
    queries: int = 0
    malformed: int = 0
    """Thoughts so far that were no thoughts and were thrown away."""

    @property
    def prompt(self) -> str:
        """Character for character as in training."""
        return initial_content(self.task) if self.thought is None else with_instruction(self.task, self.thought)

    @property
    def must_think(self) -> bool:
        """Whether the next query thinks whatever the model wants."""
        return self.queries == 0 and self.in_a_row < MAX_THOUGHTS

    def decide(self, logits: Float[np.ndarray, "2"]) -> Choice:
        """What this query does, given the logits of (reason, act) at END_OF_PREFIX."""
        if self.must_think:
            return "reason"
        return "reason" if self.in_a_row < MAX_THOUGHTS and logits[0] > logits[1] else "act"

    def after_thought(self, text: str, finished: bool) -> "Agent":
        """After the model wrote ``text``; ``finished`` says whether it came to an end by itself.

        A text that is cut off, or has not the three parts of a thought, is counted and forgotten: the old one stays.
        """
        good = finished and parse_thought(text) is not None
        return dataclasses.replace(
            self,
            thought=text if good else self.thought,
            in_a_row=self.in_a_row + 1,
            queries=self.queries + 1,
            malformed=self.malformed + (not good),
        )

    def after_action(self) -> "Agent":
        """After a chunk of actions was given out."""
        return dataclasses.replace(self, in_a_row=0, queries=self.queries + 1)
