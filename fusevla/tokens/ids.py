"""The ids with a fixed meaning, for a vocabulary of any size."""

import dataclasses

__all__ = ["PALIGEMMA_SOURCE", "RESERVED_ROWS", "ProtocolIds", "protocol_ids"]

PALIGEMMA_SOURCE = "gs://big_vision/paligemma_tokenizer.model"
"""The published tokenizer; wherever a tokenizer's path is expected, this means the copy in a cache, fetched if need be."""

RESERVED_ROWS = 132
"""BEGIN_OF_REASONING is this far from the end of the vocabulary; the two other protocol ids follow it."""


@dataclasses.dataclass(frozen=True)
class ProtocolIds:
    """Ids with a fixed meaning: 257020, 257021, 257022, 1, 2, 0 in the published vocabulary."""

    bor: int
    """BEGIN_OF_REASONING: a thought follows."""
    boa: int
    """BEGIN_OF_ACTION: actions follow."""
    eop: int
    """END_OF_PREFIX: the model decides here."""
    eos: int = 1
    bos: int = 2
    pad: int = 0

    @property
    def protocol(self) -> tuple[int, int, int]:
        """The three ids that no text may contain, in ascending order."""
        return self.bor, self.boa, self.eop


def protocol_ids(vocab_size: int) -> ProtocolIds:
    """The protocol ids of a vocabulary: the same distance from its end whatever its size.

    Raises:
        ValueError: ``vocab_size`` leaves no room for them.
    """
    if vocab_size < RESERVED_ROWS + 3:
        raise ValueError(f"vocab_size: expected >= {RESERVED_ROWS + 3} (pad, eos, bos and the reserved rows), got {vocab_size}")
    first = vocab_size - RESERVED_ROWS
    return ProtocolIds(bor=first, boa=first + 1, eop=first + 2)
