"""How long the texts of a source are, and how much of them and of the states gets lost: known before training starts."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from fusevla.arrays import Float
from fusevla.data.annotations import Kind, Thought
from fusevla.tokens.protocol import STATE_BINS, TokenizedText, encode_sample
from fusevla.tokens.tokenizer import Tokenizer

__all__ = ["TextReport", "full_length", "measure_text"]

UNLIMITED = 1 << 30


@dataclasses.dataclass(frozen=True)
class TextReport:
    """What a source's texts and states look like as tokens, known before training starts."""

    thoughts: int
    """Distinct thoughts (prompt, target and kind) that can be drawn."""
    longest: dict[Kind, int]
    """Tokens of the longest sample of each kind, with a state of three digits in every dimension, before truncation."""
    truncated: int
    """Distinct thoughts whose prompt loses text to fit ``max_len``."""
    max_len: int
    clipped: int
    """State values outside [-1, 1] after normalisation, over all rows of the source."""
    values: int
    """All state values."""

    def __str__(self) -> str:
        lengths = ", ".join(f"{kind} {length}" for kind, length in sorted(self.longest.items()))
        lines = [f"{self.thoughts} distinct thoughts; longest in tokens: {lengths} (limit {self.max_len})"]
        if self.truncated:
            lines.append(f"{self.truncated} of them lose prompt text to fit; raise max_token_len to keep it")
        if self.clipped:
            share = 100 * self.clipped / self.values
            lines.append(
                f"{self.clipped} of {self.values} state values ({share:.2g}%) lie outside [-1, 1] and are clipped in the prompt"
            )
        return "\n".join(lines)


def measure_text(
    thoughts: Iterable[Thought], encode: Callable[[Thought], TokenizedText], states: Float[np.ndarray, "n a"], max_len: int
) -> TextReport:
    """Encodes every thought once and looks at every normalised state.

    Raises:
        ValueError: a thought that ``encode`` cannot fit into the limit, however short its prompt.
    """
    longest: dict[Kind, int] = {}
    truncated = 0
    distinct = list(thoughts)
    for thought in distinct:
        text = encode(thought)
        longest[thought.kind] = max(longest.get(thought.kind, 0), len(text.tokens) + text.truncated)
        truncated += text.truncated > 0
    clipped = int(np.count_nonzero(np.abs(states) > 1))
    return TextReport(len(distinct), longest, truncated, max_len, clipped, states.size)


def full_length(tokenizer: Tokenizer, thought: Thought, state_dim: int) -> int:
    """Tokens of a sample with a state of three digits in every dimension, before anything is cut to fit a limit."""
    widest = np.full(state_dim, STATE_BINS - 1)
    return len(encode_sample(tokenizer, thought.prefix, widest, thought.target, thought.kind, UNLIMITED).tokens)
