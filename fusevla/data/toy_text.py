"""The toy's tokenizer: every text of its world, colours as words of their own, fixed phrases as single pieces."""

from typing import Final

from fusevla.data.prompts import initial_content, plan_thought, with_instruction
from fusevla.data.toy import subgoal
from fusevla.data.toy_world import COLORS
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer

DIRECTIONS: Final = (" from left to right", " from right to left", " from top to bottom", " from bottom to top")
"""More than the set's relations: the tokenizer is the base's, and a base knows more words than the set it is fine-tuned on."""
SYMBOLS: Final = (
    "Instruction: ", " \nPlan:", " TBD", "\n What I have done:", "\nNow I need to do:", "put the", " put the",
    " block in the tray", " block and the", " block and", *DIRECTIONS,
)  # fmt: skip
"""Phrases that are one piece of the toy's tokenizer. Colours are words of their own."""


def corpus() -> list[str]:
    """Every kind of text that the toy world can produce, for training its tokenizer."""
    names = list(COLORS)
    pair = [subgoal(names[0]), subgoal(names[1])]
    tasks = [f"put the {a} block and the {b} block in the tray{p}" for a in names for b in names for p in (*DIRECTIONS, "")]
    tasks += [f"leave the {c} block and {subgoal(c)}" for c in names] + [f"{subgoal(c)} and leave the {c} block" for c in names]
    texts = [initial_content(task) for task in tasks] + [initial_content(task).strip() for task in tasks]
    return texts + [with_instruction(pair[0], plan_thought(pair, done)) for done in range(3)]


def toy_tokenizer() -> Tokenizer:
    """The toy's SentencePiece model, made anew (the same bytes every time)."""
    return train_tokenizer(corpus(), symbols=SYMBOLS, join_newlines=False)
