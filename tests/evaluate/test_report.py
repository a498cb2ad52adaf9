"""Pictures: they are written whatever is missing, and the text in them is what the tokens say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusevla.evaluate.report import describe, plot_batch, plot_losses, shown
from fusevla.tokens.protocol import encode_sample
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer
from tests.train.synthetic import random_batch

ROW = {"loss": 1.0, "text_loss": None, "action_loss": 2.0, "grad_norm": 3.0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Instruction: tidy $up$. \nPlan: 1. go\n"], vocab_size=800)


def smallest_side(path: Path) -> int:
    with Image.open(path) as image:
        return min(image.size)


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_loss_curves(tmp_path: Path, count: int) -> None:
    rows = [{"step": step, **ROW, "loss": 1 / (step + 1)} for step in range(count)]
    plot_losses(rows, [{"step": 0, "text_loss": 4.0, "action_loss": None}], tmp_path / "losses.png")
    assert smallest_side(tmp_path / "losses.png") > 500


def test_both_kinds_of_samples_are_shown() -> None:
    batch = random_batch(0, size=8)
    acts = np.arange(8) != 6
    assert shown(dataclasses.replace(batch, diffusion_loss_mask=acts), 3) == [0, 1, 6]
    assert shown(batch, 4) == [0, 1, 2, 3]


def test_batch_picture_shows_the_decoded_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    batch = random_batch(0, size=2, length=64)
    observation = batch.observation
    prefix = "Instruction: tidy $up$. \nPlan: 1. go\n"
    for index, target in enumerate(("Plan: 1. go\n", None)):
        text = encode_sample(tokenizer, prefix, np.array([7]), target, "act" if target is None else "reason", 64)
        fields = (observation.tokens, observation.token_mask, observation.token_ar_mask, batch.token_loss_mask)
        for array, row in zip(fields, (text.tokens, text.mask, text.ar_mask, text.loss_mask), strict=True):
            array[index] = 0  # type: ignore[index]
            array[index, : len(row)] = row  # type: ignore[index]
    assert describe(batch, tokenizer, 0)[:2] == (f"{prefix}; State: 7", "Plan: 1. go\n")
    assert describe(batch, tokenizer, 1)[1] == "ACT"
    assert "1 supervised, actions trained" in describe(batch, tokenizer, 1)[2]
    plot_batch(batch, tokenizer, tmp_path / "batch.png")
    assert smallest_side(tmp_path / "batch.png") > 500
