"""A stand-in for ``paligemma_tokenizer.model`` (which no test may download): same ids where the protocol looks, other words."""

import functools

from sentencepiece import sentencepiece_model_pb2

from fusevla.tokens.ids import RESERVED_ROWS
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer

WORDS = ["Instruction: pick up the alphabet soup. \nPlan: TBD.\n What I have done: TBD.\n", "<loc_>0123456789segabc"]


@functools.cache
def paligemma_like(pieces: int = 257152) -> Tokenizer:
    """A model of ``pieces`` pieces that ends, as PaliGemma's does, with <loc0000>..<loc1023>, <seg000>..<seg127>.

    Where there is no room for all of them, the first ``<loc>`` pieces are left out.
    """
    base = train_tokenizer(WORDS, vocab_size=600, state_numbers=False)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(base.model_bytes)
    special = [f"<loc{n:04d}>" for n in range(1024)] + [f"<seg{n:03d}>" for n in range(128)]
    kept = special[-(pieces - len(model.pieces)) :]
    piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    for n in range(pieces - len(model.pieces) - len(kept)):
        model.pieces.append(piece(piece=f"\ue000{n}", score=-1e6, type=piece.NORMAL))
    model.pieces.extend(piece(piece=text, score=0.0, type=piece.USER_DEFINED) for text in kept)
    assert len(model.pieces) == pieces
    assert model.pieces[pieces - RESERVED_ROWS].piece == "<loc1020>"
    return Tokenizer(model.SerializeToString())
