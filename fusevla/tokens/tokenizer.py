"""A SentencePiece model as the rest of the library sees it: text in, ids out, and no way for text to forge a protocol id.

Two kinds of model file are understood:

* ``paligemma_tokenizer.model`` (257,152 pieces), whose last 132 pieces start with the three that the token protocol took over
  (``<loc1020>``, ``<loc1021>``, ``<loc1022>``);
* any other model with pad 0, eos 1, bos 2, such as ``train_tokenizer`` makes. It gets 132 further rows behind its pieces, so
  that the protocol ids keep their distance from the end of the vocabulary.

Nothing here imports jax: worker processes unpickle tokenizers.
"""

import io
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import sentencepiece

from fusevla.files import cache_folder, openpi_cache_folder, write_whole
from fusevla.tokens.ids import PALIGEMMA_SOURCE, RESERVED_ROWS, protocol_ids

__all__ = ["Tokenizer", "load_tokenizer", "paligemma_tokenizer_path", "train_tokenizer"]

PALIGEMMA_VOCAB_SIZE = 257152
_PALIGEMMA_HTTP = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"
_FETCH_TIMEOUT_S = 20

_SPACE = "\u2581"
"""SentencePiece writes a space as this character, and reads this character back as a space."""

_FIRST_TEXT_PIECE = 260
"""pad, eos, bos, unk and 256 byte pieces come before anything that a trained model learns."""


class Tokenizer:
    """A SentencePiece model plus the protocol ids. Cheap to pickle: it travels as its serialised model.

    ``encode`` never yields a protocol id nor pad, eos or bos (except where ``bos``/``eos`` ask for them), whatever the text;
    ``decode`` keeps newlines and spaces and drops everything that is not text.
    """

    def __init__(self, model_bytes: bytes, vocab_size: int | None = None):
        """``vocab_size`` overrides the rule of the module docstring (rows of the embedding table that belongs to it).

        Raises:
            ValueError: not a SentencePiece model, special ids elsewhere than 0/1/2, or a vocabulary smaller than the model.
        """
        self._model = _parse_model(model_bytes)
        self._model_bytes = model_bytes
        pieces = self._model.get_piece_size()
        self.vocab_size = _vocabulary_size(self._model) if vocab_size is None else vocab_size
        """Rows that an embedding table needs: every piece and the protocol ids."""
        if self.vocab_size < pieces:
            raise ValueError(f"tokenizer: expected vocab_size >= the model's {pieces} pieces, got {vocab_size}")
        self.ids = protocol_ids(self.vocab_size)
        self._forbidden = frozenset((*self.ids.protocol, self.ids.pad, self.ids.eos, self.ids.bos))
        self._not_text = self._forbidden | {i for i in range(min(pieces, 512)) if self._model.is_control(i)}
        self._byte_ids = tuple(self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._has_bytes = self._model.unk_id() not in self._byte_ids

    @property
    def model_bytes(self) -> bytes:
        """The serialised SentencePiece model: what a checkpoint stores."""
        return self._model_bytes

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``; a piece that would be a protocol id is spelled out in characters instead."""
        ids = [i for piece in self._encode_raw(text) for i in (self._spell(piece) if piece in self._forbidden else (piece,))]
        return [self.ids.bos] * bos + ids + [self.ids.eos] * eos

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of ``ids``. Protocol, control and reserved ids, and ids beyond the model's pieces, contribute nothing.

        Raises:
            ValueError: a negative id.
        """
        numbers = [int(i) for i in ids]
        if numbers and min(numbers) < 0:
            raise ValueError(f"decode: expected ids >= 0, got {min(numbers)}")
        pieces = self._model.get_piece_size()
        return self._model.decode([i for i in numbers if i < pieces and i not in self._not_text])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as a ``.model`` file that ``load_tokenizer`` (and SentencePiece itself) reads."""
        write_whole(path, self._model_bytes)

    def _encode_raw(self, text: str) -> list[int]:
        """SentencePiece's own ids, except that the character it takes for a space survives as bytes."""
        if _SPACE not in text or not self._has_bytes:
            return self._model.encode(text)
        first, *others = text.split(_SPACE)
        space = [self._byte_ids[byte] for byte in _SPACE.encode()]
        return self._model.encode(first) + [i for part in others for i in space + self._model.encode(part)]

    def _spell(self, piece: int) -> list[int]:
        """The surface of a piece, one character at a time: no learned piece, so none that could be forbidden."""
        unknown = self._model.unk_id()
        ids: list[int] = []
        for character in self._model.id_to_piece(piece):
            single = self._model.piece_to_id(character)
            spelled = [self._byte_ids[byte] for byte in character.encode()] if single == unknown else [single]
            ids.extend(spelled)
        return ids

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, int]]:
        return Tokenizer, (self._model_bytes, self.vocab_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.vocab_size, self._model_bytes) == (other.vocab_size, other._model_bytes)

    def __hash__(self) -> int:
        return hash((self.vocab_size, self._model_bytes))

    def __repr__(self) -> str:
        return f"Tokenizer({self._model.get_piece_size()} pieces, vocab_size={self.vocab_size})"


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a SentencePiece ``.model`` file; ``PALIGEMMA_SOURCE`` stands for ``paligemma_tokenizer_path()``.

    Raises:
        FileNotFoundError: no file there, or it could not be fetched.
        ValueError: the file is not a usable SentencePiece model.
    """
    file = paligemma_tokenizer_path() if str(path) == PALIGEMMA_SOURCE else pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer: expected a SentencePiece .model file, found none at {file}. Give the path of "
            "paligemma_tokenizer.model, or train a small model on the set's own text (--tokenizer train)."
        )
    try:
        return Tokenizer(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def paligemma_tokenizer_path() -> pathlib.Path:
    """The PaliGemma tokenizer on this machine: our cache, openpi's cache, or fetched once into ours.

    The caches are ``$FUSEVLA_CACHE`` (default ``~/.cache/fusevla``) and ``$OPENPI_DATA_HOME`` (default ``~/.cache/openpi``).

    Raises:
        FileNotFoundError: in no cache, and it could not be fetched; the message says how to get it.
    """
    own = cache_folder() / "paligemma_tokenizer.model"
    openpi = openpi_cache_folder() / "big_vision" / "paligemma_tokenizer.model"
    for file in (own, openpi):
        if file.is_file():
            return file
    try:
        with urllib.request.urlopen(_PALIGEMMA_HTTP, timeout=_FETCH_TIMEOUT_S) as reply:
            content = reply.read()
    except (OSError, urllib.error.URLError) as error:
        raise FileNotFoundError(
            f"PaliGemma tokenizer: not in {own} nor {openpi}, and it could not be fetched ({error}). Get {PALIGEMMA_SOURCE} "
            f"(4 MB, public) on a machine with a network and put it at {own}, or give its path with --tokenizer PATH."
        ) from None
    _check_paligemma(content)
    write_whole(own, content)
    return own


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    *,
    symbols: Sequence[str] = (),
    state_numbers: bool = True,
    join_newlines: bool = True,
) -> Tokenizer:
    """A small SentencePiece model in which the words of ``texts`` are single pieces, most useful first, as far as room allows.

    Identity normalisation, no dummy prefix, byte fallback: ``decode(encode(text)) == text`` for every text. The same set of
    texts gives the same bytes, whatever their order or repetition.

    Args:
        texts: What the model should read and write: whole prompts and thoughts.
        vocab_size: Upper bound of the result's ``vocab_size`` (its pieces and the 132 reserved rows); words that do not fit
            fall back to learned sub-words. The result is smaller where the texts need less.
        symbols: Further strings that are always one piece, such as whole phrases (longest match wins).
        state_numbers: Make " 0" ... " 255" pieces, so that a state dimension of the prompt is one token.
        join_newlines: A word and the newline after it are one piece ("soup\\n"); False keeps newlines apart, so that a word
            has one embedding wherever it stands.

    Raises:
        ValueError: no text, an empty symbol, or a ``vocab_size`` that has no room for bytes, symbols and characters.
    """
    corpus = sorted({text.replace(_SPACE, " ") for text in texts} - {""})
    if not corpus:
        raise ValueError("train_tokenizer: expected at least one text that is not empty, got none")
    if "" in symbols:
        raise ValueError(f"train_tokenizer: expected symbols of at least one character, got {list(symbols)}")
    # Ids follow this order, so it must not depend on a set's iteration order.
    numbers = [f" {n}" for n in range(256)] if state_numbers else []
    fixed: list[str] = list(dict.fromkeys([*numbers, ";", " State:", *symbols]))
    room = vocab_size - RESERVED_ROWS - _FIRST_TEXT_PIECE - len(fixed) - len(set("".join(corpus)))
    if room < 0:
        raise ValueError(
            f"train_tokenizer: expected vocab_size >= {vocab_size - room} (bytes, {len(fixed)} symbols, the texts' characters "
            f"and {RESERVED_ROWS} reserved rows), got {vocab_size}"
        )
    words = [word for word in _useful_words(corpus, join_newlines) if word not in set(fixed)]
    return Tokenizer(_train(corpus, [*fixed, *words[:room]], vocab_size - RESERVED_ROWS))


def _useful_words(corpus: Sequence[str], join_newlines: bool) -> list[str]:
    """Words with the space before (and the newline after) them, by how many tokens they save."""
    pattern = re.compile(r" ?[^\s]+\n?| +\n?|\n+|\s" if join_newlines else r" ?[^\s]+| +|\n+|\s")
    counts = Counter(word for text in corpus for word in pattern.findall(text) if len(word) > 1)
    return sorted(counts, key=lambda word: (-counts[word] * (len(word) - 1), word))


def _train(corpus: Sequence[str], symbols: Sequence[str], pieces: int) -> bytes:
    """Runs the SentencePiece trainer: quiet, one thread, no file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in symbols],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _parse_model(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(model_bytes)
    except RuntimeError:
        raise ValueError(f"tokenizer: expected a serialised SentencePiece model, got {len(model_bytes)} other bytes") from None
    got = {"pad": model.pad_id(), "eos": model.eos_id(), "bos": model.bos_id()}
    if got != {"pad": 0, "eos": 1, "bos": 2}:
        raise ValueError(f"tokenizer: expected pad 0, eos 1, bos 2 (the protocol's ids), got {got}; train it with those ids")
    return model


def _vocabulary_size(model: sentencepiece.SentencePieceProcessor) -> int:
    """The model's own size where its last pieces are PaliGemma's ``<loc>``/``<seg>`` rows, else 132 more."""
    pieces = model.get_piece_size()
    reserved = pieces == PALIGEMMA_VOCAB_SIZE or model.piece_to_id("<loc1020>") == pieces - RESERVED_ROWS
    return pieces if reserved else pieces + RESERVED_ROWS


def _check_paligemma(content: bytes) -> None:
    size = Tokenizer(content).vocab_size
    if size != PALIGEMMA_VOCAB_SIZE:
        raise ValueError(f"{PALIGEMMA_SOURCE}: expected a vocabulary of {PALIGEMMA_VOCAB_SIZE}, got {size}; fetch it by hand")
