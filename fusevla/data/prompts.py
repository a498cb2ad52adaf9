"""The strings that prompts and thoughts are made of, character for character as annotated: training and inference share them."""

import dataclasses
import re
from collections.abc import Sequence

__all__ = ["DUE", "ParsedThought", "initial_content", "parse_thought", "plan_thought", "with_instruction"]

DUE = "Now I need to do: "
"""How the last line of a thought begins."""
_THOUGHT = re.compile(
    r"Plan: (?P<plans>\d+\. [^\n]+(?:\n\d+\. [^\n]+)*)"
    r"\n What I have done: (?P<done>[^\n]+(?:\n(?!Now I need to do:)[^\n]+)*)"
    r"\nNow I need to do: (?P<now>[^\n]+)\n?"
)
_NUMBERED = re.compile(r"^\d+\. (.+)$", re.MULTILINE)


def initial_content(task: str) -> str:
    """The prompt before the first thought, character for character as annotated (the spaces are in the data)."""
    return with_instruction(task, "Plan: TBD.\n What I have done: TBD.\nNow I need to do: TBD.\n")


def with_instruction(task: str, thought: str) -> str:
    """The prompt after a thought: the instruction, then the thought as the model wrote it."""
    return f"Instruction: {task}. \n{thought}"


def plan_thought(plans: Sequence[str], done: int) -> str:
    """The thought of an episode with these plans of which the first ``done`` are finished.

    Raises:
        ValueError: no plan, or more of them done than there are.
    """
    if not 0 <= done <= len(plans) or not plans:
        raise ValueError(f"plan_thought: expected plans and 0 <= done <= {len(plans)}, got {list(plans)} and {done}")
    numbered = [f"{number}. {plan}" for number, plan in enumerate(plans, 1)]
    finished = "\n".join(numbered[:done]) or "Nothing."
    now = plans[done] if done < len(plans) else "Nothing. Task complete."
    return "Plan: " + "\n".join(numbered) + f"\n What I have done: {finished}\n{DUE}{now}\n"


@dataclasses.dataclass(frozen=True)
class ParsedThought:
    """What a thought says: all plans, those it takes for done, and the one that is due (None: the task is complete)."""

    plans: tuple[str, ...]
    done: tuple[str, ...]
    now: str | None


def parse_thought(text: str) -> ParsedThought | None:
    """The inverse of ``plan_thought``, for text that a model wrote; None where it has not the three parts of a thought."""
    parts = _THOUGHT.fullmatch(text)
    if parts is None:
        return None
    plans, done = (tuple(_NUMBERED.findall(parts[name])) for name in ("plans", "done"))
    return ParsedThought(plans, done, None if parts["now"].startswith("Nothing.") else parts["now"])
