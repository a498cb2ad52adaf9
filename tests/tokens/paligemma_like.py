"""A stand-in for ``paligemma_tokenizer.model`` (which no test may download): same ids where the protocol looks, other words."""

import functools
import struct

from fusevla.tokens.ids import RESERVED_ROWS
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer

NORMAL, USER_DEFINED = 1, 4
WORDS = ["Instruction: pick up the alphabet soup. \nPlan: TBD.\n What I have done: TBD.\n", "<loc_>0123456789segabc"]


@functools.cache
def paligemma_like(pieces: int = 257152) -> Tokenizer:
    """A model of ``pieces`` pieces that ends, as PaliGemma's does, with <loc0000>..<loc1023>, <seg000>..<seg127>.

    Where there is no room for all of them, the first ``<loc>`` pieces are left out.
    """
    base = train_tokenizer(WORDS, vocab_size=600, state_numbers=False)
    own = base.vocab_size - RESERVED_ROWS
    special = [f"<loc{n:04d}>" for n in range(1024)] + [f"<seg{n:03d}>" for n in range(128)]
    kept = special[-(pieces - own) :]
    fillers = [_piece(f"\ue000{n}", -1e6, NORMAL) for n in range(pieces - own - len(kept))]
    # Joining serialised messages appends to their repeated fields: here, to the model's list of pieces.
    model = Tokenizer(b"".join([base.model_bytes, *fillers, *(_piece(text, 0.0, USER_DEFINED) for text in kept)]))
    assert model.vocab_size == pieces
    assert special[-RESERVED_ROWS] == "<loc1020>"
    return model


def _piece(text: str, score: float, kind: int) -> bytes:
    """A ``SentencePiece`` message {1: piece, 2: score, 3: type} as field 1 of a ``ModelProto`` (sentencepiece_model.proto).

    Written by hand because the package's own classes want the protobuf release that they were generated with.
    """
    word = text.encode()
    message = b"\x0a" + bytes([len(word)]) + word + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(message)]) + message
