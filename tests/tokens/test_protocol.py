"""The token protocol: the masks table, the state's bins, and prefixes that are too long."""

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusevla.tokens.protocol import digitize_state, encode_prompt, encode_sample, format_prompt
from fusevla.tokens.tokenizer import train_tokenizer

PREFIX = "Instruction: put the red block in the bowl. \nPlan: TBD.\n What I have done: TBD.\nNow I need to do: TBD.\n"
THOUGHT = "Plan: 1. grasp the red block\nNow I need to do: grasp the red block\n"
TOKENIZER = train_tokenizer([PREFIX, THOUGHT])
IDS = TOKENIZER.ids
BINS = np.array([0, 128, 255])
_TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = [_TESTS.parents[1] / "shared" / "golden" / "small.npz", _TESTS / "golden" / "small.npz"]


def encode(kind, target=None, prefix=PREFIX, max_len=200, **options):
    return encode_sample(TOKENIZER, prefix, BINS, target, kind, max_len, **options)


@pytest.mark.parametrize(
    ("kind", "target", "supervise", "suffix_loss", "diffusion"),
    [
        ("reason", THOUGHT, True, "all", False),
        ("reason", THOUGHT, False, "all", False),
        ("reason_outdated", THOUGHT, True, "first", False),
        ("act", None, True, "all", True),
        ("act", None, False, "none", True),
        ("act_outdated", None, True, "none", True),
        ("act_outdated", None, False, "none", True),
    ],
)
def test_the_table_of_masks(kind, target, supervise, suffix_loss, diffusion):
    sample = encode(kind, target, supervise_act_decision=supervise)
    prompt = TOKENIZER.encode(f"{PREFIX}; State: 0 128 255", bos=True)
    suffix = [IDS.boa] if target is None else [IDS.bor, *TOKENIZER.encode(THOUGHT), IDS.eos]
    assert sample.tokens.tolist() == [*prompt, IDS.eop, *suffix]
    assert sample.tokens.dtype == np.int32
    assert sample.ar_mask.tolist() == [False] * (len(prompt) + 1) + [True] * len(suffix)
    expected = {"all": [True] * len(suffix), "first": [True] + [False] * (len(suffix) - 1), "none": [False] * len(suffix)}
    assert sample.loss_mask.tolist() == [False] * (len(prompt) + 1) + expected[suffix_loss]
    assert sample.mask.tolist() == [True] * len(sample.tokens)
    assert (sample.diffusion, sample.truncated, sample.clipped) == (diffusion, 0, 0)


def test_the_text_is_encoded_exactly_as_annotated():
    prefix = "  Instruction: a_b. \n\n What  "
    sample = encode("act", prefix=prefix)
    assert TOKENIZER.decode(sample.tokens) == format_prompt(prefix, BINS) == "  Instruction: a_b. \n\n What  ; State: 0 128 255"


@pytest.mark.parametrize(
    ("kind", "target"), [("reason", None), ("reason_outdated", None), ("act", THOUGHT), ("act_outdated", "")]
)
def test_targets_belong_to_reasoning_only(kind, target):
    with pytest.raises(ValueError, match="target: expected a text where"):
        encode(kind, target)


def test_unknown_kind():
    with pytest.raises((ValueError, TypeError), match="kind"):  # TypeError where shapes and types are checked at run time
        encode("think", THOUGHT)


def test_the_prompt_at_inference_is_the_prefix_of_training():
    state = np.array([-1.0, 0.0, 3.0], dtype=np.float32)
    prompt = encode_prompt(TOKENIZER, PREFIX, state, 200)
    sample = encode("act")
    assert prompt.tokens.tolist() == sample.tokens[:-1].tolist()
    assert prompt.tokens[-1] == IDS.eop
    assert not prompt.ar_mask.any()
    assert not prompt.loss_mask.any()
    assert not prompt.diffusion
    assert prompt.clipped == 1


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([" red", " block", "\n", "é", "<loc1022>", " grasp", "x"]), max_size=60).map("".join),
    st.integers(45, 80),
    st.sampled_from([("reason", THOUGHT), ("reason_outdated", THOUGHT), ("act", None), ("act_outdated", None)]),
)
def test_truncation_only_ever_shortens_the_prefix_text(prefix, max_len, kind_target):
    kind, target = kind_target
    full = encode(kind, target, prefix=prefix, max_len=10_000)
    sample = encode(kind, target, prefix=prefix, max_len=max_len)
    assert len(sample.tokens) <= max_len
    assert (sample.truncated > 0) == (len(full.tokens) > max_len)
    assert sample.truncated == len(full.tokens) - len(sample.tokens)
    assert sample.tokens[sample.loss_mask].tolist() == full.tokens[full.loss_mask].tolist()
    assert sample.tokens[sample.ar_mask].tolist() == full.tokens[full.ar_mask].tolist()
    assert (sample.tokens == IDS.eop).sum() == 1
    assert sample.tokens[~sample.ar_mask][-1] == IDS.eop
    assert TOKENIZER.decode(sample.tokens[~sample.ar_mask]).endswith("; State: 0 128 255")


def test_truncation_keeps_the_instruction_and_the_current_goal():
    prefix = "Instruction: put the red block in the bowl. \n" + "2. grasp the red block\n" * 40 + "Now I need to do: TBD.\n"
    sample = encode("act", prefix=prefix, max_len=60)
    text = TOKENIZER.decode(sample.tokens)
    assert text.startswith("Instruction: put the red block")
    assert text.endswith("Now I need to do: TBD.\n; State: 0 128 255")
    assert len(sample.tokens) > 50
    assert sample.truncated > 100


def test_a_thought_that_cannot_fit_is_an_error():
    needed = 1 + len(TOKENIZER.encode("; State: 0 128 255")) + 1 + len(TOKENIZER.encode(THOUGHT)) + 2
    assert len(encode("reason", THOUGHT, max_len=needed).tokens) == needed
    with pytest.raises(ValueError, match=rf"expected max_token_len >= {needed} .*got {needed - 1}; raise max_token_len"):
        encode("reason", THOUGHT, max_len=needed - 1)


@pytest.mark.parametrize(
    ("value", "bin_", "clipped"),
    [(-5.0, 0, 1), (-1.0001, 0, 1), (-1.0, 0, 0), (-0.99, 1, 0), (0.0, 128, 0), (0.999, 255, 0), (1.0, 255, 0), (1.0001, 255, 1)],
)
def test_digitizing_clips_and_counts(value, bin_, clipped):
    bins, count = digitize_state(np.array([value]))
    assert (bins.tolist(), count) == ([bin_], clipped)


@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_digitizing_agrees_with_a_loop_over_edges(values):
    edges = [-1 + 2 * k / 256 for k in range(256)]
    bins, clipped = digitize_state(np.array(values, dtype=np.float32))
    assert bins.tolist() == [min(max(sum(edge <= value for edge in edges) - 1, 0), 255) for value in values]
    assert clipped == sum(abs(value) > 1 for value in values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_bin_for_what_is_not_finite(value):
    with pytest.raises(ValueError, match="state: expected finite values"):
        digitize_state(np.array([0.0, value]))


def test_digitizing_agrees_with_the_reference_numbers():
    file = next((file for file in GOLDEN if file.is_file()), None)
    if file is None:
        pytest.skip("no golden small.npz")
    golden = np.load(file)
    bins, clipped = digitize_state(golden["digitize/state"])
    assert bins.tolist() == np.clip(golden["digitize/out"], 0, 255).tolist(), "ours clips where the reference writes -1"
    assert clipped == int((np.abs(golden["digitize/state"]) > 1).sum())
