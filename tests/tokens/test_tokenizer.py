"""The tokenizer: exact round trips, no forged protocol id, small models that read words as single tokens."""

import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusevla.tokens.ids import protocol_ids
from fusevla.tokens.tokenizer import Tokenizer, load_tokenizer, paligemma_tokenizer_path, train_tokenizer
from tests.tokens.paligemma_like import paligemma_like

PROMPT = "Instruction: put_the red block  in the bowl. \nPlan: 1. grasp the red block\n2. lift it\n What I have done: Nothing.\n"
TINY = train_tokenizer([PROMPT])
FORGED = ["<loc1020>", "<loc1021>", "<loc1022>"]
TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from([*FORGED, "<loc", "1020>", "<bos>", "</s>", "<pad>", "_", "\u2581", " ", "\n", "red", "\r\n", "é", "\0"])
    ).map("".join),
)


@pytest.mark.parametrize(("vocab_size", "expected"), [(257152, (257020, 257021, 257022)), (512, (380, 381, 382))])
def test_protocol_ids_keep_their_distance_from_the_end(vocab_size, expected):
    ids = protocol_ids(vocab_size)
    assert (ids.bor, ids.boa, ids.eop) == ids.protocol == expected
    assert (ids.eos, ids.bos, ids.pad) == (1, 2, 0)


def test_protocol_ids_need_room():
    with pytest.raises(ValueError, match=r"vocab_size: expected >= 135 .*got 134"):
        protocol_ids(134)


@given(TEXTS)
@example("  two  spaces \n\n\n_under_ \u2581 lead\t\r\n ")
@example("")
def test_decoding_what_was_encoded_gives_the_same_text(text):
    assert TINY.decode(TINY.encode(text)) == text
    assert TINY.decode(TINY.encode(text, bos=True, eos=True)) == text


@settings(max_examples=50)
@given(TEXTS)
@example("<loc1020><loc1021><loc1022>")
@example("pick up <loc1021>, then <<loc1022>>")
def test_no_text_encodes_to_a_protocol_id(text):
    small = paligemma_like(560)
    for tokenizer in (TINY, small):
        ids = tokenizer.encode(text)
        assert not set(ids) & {*tokenizer.ids.protocol, tokenizer.ids.pad, tokenizer.ids.eos, tokenizer.ids.bos}
        assert tokenizer.decode(ids) == text


def test_paligemma_sized_vocabulary_spells_forged_pieces_out():
    tokenizer = paligemma_like()
    assert tokenizer.vocab_size == 257152
    assert tokenizer.ids.protocol == (257020, 257021, 257022)
    raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    for text, forged in zip(FORGED, tokenizer.ids.protocol, strict=True):
        assert raw.encode(text) == [forged], "the stand-in must be vulnerable without our tokenizer"
        assert forged not in tokenizer.encode(f"pick up {text}{text}")
        assert tokenizer.decode(tokenizer.encode(f"pick up {text}")) == f"pick up {text}"
    assert tokenizer.encode("<loc0007>") == [256007], "other location tokens stay usable"
    assert tokenizer.encode("<loc1023>") == [257023]


def test_bos_and_eos_only_on_request():
    plain = TINY.encode("lift it")
    assert TINY.encode("lift it", bos=True) == [2, *plain]
    assert TINY.encode("lift it", eos=True) == [*plain, 1]


def test_decoding_drops_everything_that_is_not_text():
    ids = TINY.encode("red block\n")
    noise = [TINY.ids.bor, TINY.ids.boa, TINY.ids.eop, 0, 1, 2, TINY.vocab_size - 1, TINY.vocab_size + 7]
    assert TINY.decode([*noise, *ids, *noise]) == "red block\n"
    with pytest.raises(ValueError, match="ids >= 0, got -3"):
        TINY.decode([-3])


def test_words_with_their_newline_are_single_pieces():
    assert len(TINY.encode(" red")) == len(TINY.encode(" block\n")) == len(TINY.encode("Instruction:")) == 1
    assert len(TINY.encode("; State: 0 255 17")) == 5
    assert len(TINY.encode("\nPlan: 1. grasp the red block\n2. lift it\n")) <= 10


def test_newlines_can_stay_apart_and_symbols_can_be_phrases():
    apart = train_tokenizer([PROMPT], join_newlines=False, symbols=[" grasp the", "a,b\nc"])
    assert apart.encode(" block\n") == [*apart.encode(" block"), *apart.encode("\n")]
    assert len(apart.encode(" grasp the")) == len(apart.encode("a,b\nc")) == 1


def test_numbers_are_optional():
    without = train_tokenizer([PROMPT], state_numbers=False)
    assert without.vocab_size < TINY.vocab_size
    assert len(without.encode(" 217")) > 1


def test_training_is_deterministic_and_bounded():
    texts = [PROMPT, "push the blue cube\n", "open the drawer"]
    again = train_tokenizer([*reversed(texts), *texts])
    assert again == train_tokenizer(texts)
    assert hash(again) == hash(train_tokenizer(texts))
    assert again.vocab_size <= 1024
    many = train_tokenizer([" ".join(f"word{n}" for n in range(500))], vocab_size=720)
    assert many.vocab_size <= 720
    assert many.decode(many.encode("word3 word499")) == "word3 word499"


def test_training_does_not_depend_on_the_hash_seed_and_is_quiet():
    code = (
        "import hashlib; from fusevla.tokens.tokenizer import train_tokenizer as t;"
        f"print(hashlib.sha256(t([{PROMPT!r}, 'open the drawer']).model_bytes).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stderr == runs[1].stderr == ""


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one text"),
        ([""], {}, "at least one text"),
        (["a"], {"symbols": [""]}, "at least one character"),
        (["a"], {"vocab_size": 500}, r"expected vocab_size >= 65\d .*got 500"),
    ],
)
def test_training_errors(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, **options)


def test_the_smallest_vocabulary_that_the_message_names_works():
    with pytest.raises(ValueError, match="expected vocab_size >=") as error:
        train_tokenizer([PROMPT], vocab_size=400)
    least = int(str(error.value).split(">= ")[1].split()[0])
    tokenizer = train_tokenizer([PROMPT], vocab_size=least)
    assert tokenizer.vocab_size <= least
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT


def test_file_and_pickle_round_trip(tmp_path):
    TINY.save(tmp_path / "deep" / "toy.model")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["toy.model"]
    for other in (load_tokenizer(tmp_path / "deep" / "toy.model"), pickle.loads(pickle.dumps(TINY)), Tokenizer(TINY.model_bytes)):
        assert other == TINY
        assert other.encode(PROMPT) == TINY.encode(PROMPT)


def test_unusable_files_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a SentencePiece .model file, found none at .*missing.model"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "noise.model").write_bytes(b"\x01 not a model")
    with pytest.raises(ValueError, match=r"noise.model: tokenizer: expected a serialised SentencePiece model"):
        load_tokenizer(tmp_path / "noise.model")


def test_other_special_ids_are_refused(tmp_path):
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT]),
        model_prefix=str(prefix),
        vocab_size=60,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"expected pad 0, eos 1, bos 2 .*got \{'pad': -1, 'eos': 2, 'bos': 1\}"):
        load_tokenizer(f"{prefix}.model")


def test_vocabulary_cannot_be_smaller_than_the_model():
    with pytest.raises(ValueError, match="expected vocab_size >= the model's"):
        Tokenizer(TINY.model_bytes, vocab_size=200)


def test_paligemma_is_taken_from_either_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("fetched although cached"))
    theirs = tmp_path / "openpi" / "big_vision" / "paligemma_tokenizer.model"
    TINY.save(theirs)
    assert paligemma_tokenizer_path() == theirs
    TINY.save(tmp_path / "ours" / "paligemma_tokenizer.model")
    assert paligemma_tokenizer_path() == tmp_path / "ours" / "paligemma_tokenizer.model"


class _Reply:
    def __init__(self, content: bytes):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> bytes:
        return self.content


def test_paligemma_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: _Reply(TINY.model_bytes))
    with pytest.raises(ValueError, match=r"expected a vocabulary of 257152, got"):
        paligemma_tokenizer_path()
    assert not (tmp_path / "ours").exists(), "a wrong file must not be cached"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: _Reply(paligemma_like().model_bytes))
    assert load_tokenizer(paligemma_tokenizer_path()).vocab_size == 257152


def test_paligemma_without_network_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEVLA_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .*no network.*gs://big_vision.*--tokenizer PATH"):
        paligemma_tokenizer_path()


def test_importing_the_tokenizer_does_not_import_jax():
    code = "import sys, fusevla.tokens.protocol; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
