"""Held-out figures: what counts, what never does (padding, repeated samples), and how they are named when absent."""

from collections.abc import Iterable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from fusevla.arrays import Batch
from fusevla.data.annotations import Thought
from fusevla.data.batch import Sample
from fusevla.evaluate import metrics
from fusevla.evaluate.metrics import Evaluator, HeldOut, squared_error, until_eos
from fusevla.tokens.protocol import encode_sample
from fusevla.tokens.tokenizer import Tokenizer, train_tokenizer
from fusevla.train.sharding import make_mesh
from tests.train.synthetic import small_model

HORIZON, WIDTH, REAL = 3, 4, 2
THOUGHTS = ("go left\n", "go right\n", "stay here\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(THOUGHTS, vocab_size=800)


def sample(tokenizer: Tokenizer, number: int, thought: str | None) -> Sample:
    generator = np.random.default_rng(number)
    kind = "act" if thought is None else "reason"
    actions = np.zeros((HORIZON, WIDTH), np.float32)
    actions[:, :REAL] = generator.normal(size=(HORIZON, REAL))
    return Sample(
        images={"base_0_rgb": np.zeros((4, 4, 3), np.uint8)},
        state=np.zeros(WIDTH, np.float32),
        text=encode_sample(tokenizer, f"prompt {number}", np.array([number]), thought, kind, 64),  # type: ignore[arg-type]
        actions=actions,
        action_is_pad=np.arange(HORIZON) >= HORIZON - number % 2,
        thought=Thought(f"prompt {number}", thought, kind),  # type: ignore[arg-type]
    )


class FakeModel:
    """Stands for the jitted functions: answers from a list, one row per sample of the batch, wrong where it is filled up."""

    def __init__(self, rows: Iterable[Any]):
        self.rows = list(rows)

    def take(self, count: int) -> list[Any]:
        taken, self.rows = self.rows[:count], self.rows[count:]
        return taken + [taken[-1]] * (count - len(taken))


def evaluator(tokenizer: Tokenizer, reasons: int, acts: int) -> Evaluator:
    held_out = HeldOut(
        tuple(sample(tokenizer, i, THOUGHTS[i % 3]) for i in range(reasons)),
        tuple(sample(tokenizer, i, None) for i in range(acts)),
    )
    mean = np.full(REAL, 0.5, np.float32)
    mesh = make_mesh(jax.devices()[:1])
    return Evaluator(held_out, tokenizer, mesh, text_buckets=[16, 64], mean_action=mean, batch_size=2)


def with_answers(subject: Evaluator, name: str, rows: Iterable[Any]) -> Evaluator:
    model = FakeModel(rows)

    def answer(_: Any, __: Any, batch: Batch, *___: Any) -> Any:
        taken = model.take(batch.actions.shape[0])
        return metrics._Sums(*map(np.array, zip(*taken))) if name == "_losses" else np.stack(taken)

    setattr(subject, name, answer)
    return subject


def test_whole_thoughts_are_compared_exactly(tokenizer: Tokenizer) -> None:
    def written(text: str) -> np.ndarray:
        ids = [tokenizer.ids.bor, *tokenizer.encode(text), tokenizer.ids.eos]
        return np.array(ids + [tokenizer.ids.pad] * (24 - len(ids)))

    subject = evaluator(tokenizer, reasons=3, acts=0)
    with_answers(subject, "_decode", [written("go left\n"), written("go right"), written("stay here\n")])
    pairs = subject.thoughts(small_model(), small_model())
    assert pairs == [("go left\n", "go left\n"), ("go right\n", "go right"), ("stay here\n", "stay here\n")]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_sampled_actions_against_the_mean(tokenizer: Tokenizer, scale: float, expected: float) -> None:
    subject = evaluator(tokenizer, reasons=0, acts=3)
    rows = []
    for item in subject.held_out.act:
        mean = np.pad(np.full(REAL, 0.5, np.float32), (0, WIDTH - REAL))
        answer = item.actions + scale * (mean - item.actions)
        answer[:, REAL:] = 1e6  # padded dimensions
        answer[item.action_is_pad] = -1e6  # steps past the end
        rows.append(answer)
    ratio = with_answers(subject, "_sample", rows).action_error_ratio(small_model(), small_model())
    assert ratio == pytest.approx(expected, abs=1e-6)


def test_losses_are_means_over_samples_of_their_kind(tokenizer: Tokenizer) -> None:
    subject = evaluator(tokenizer, reasons=3, acts=1)
    #       text, action, correct, targets
    rows = [(1.0, 0.0, 3, 4), (2.0, 0.0, 4, 4), (6.0, 0.0, 1, 2), None, (9.0, 5.0, 1, 1)]
    rows[3] = (100.0, 100.0, 0, 9)  # fills up the last batch of reasoning samples
    figures = with_answers(subject, "_losses", rows).losses(small_model(), small_model())
    assert figures == {"text_loss": 3.0, "token_accuracy": 0.8, "act_decision_accuracy": 1.0, "action_loss": 5.0}


def test_figures_without_samples_are_none(tokenizer: Tokenizer) -> None:
    subject = evaluator(tokenizer, reasons=0, acts=0)
    assert set(subject.all_figures(small_model(), small_model()).values()) == {None}


@hypothesis.given(st.lists(st.integers(0, 9), max_size=8))
def test_until_eos(ids: list[int]) -> None:
    expected = []
    for token in ids:
        if token == 1:
            break
        expected.append(token)
    assert until_eos(np.array(ids, np.int32), 1) == expected


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, WIDTH))
def test_squared_error_against_loops(seed: int, dims: int) -> None:
    generator = np.random.default_rng(seed)
    predicted, wanted = generator.normal(size=(2, 2, HORIZON, WIDTH)).astype(np.float32)
    is_pad = generator.random((2, HORIZON)) < 0.5
    total = sum(
        (float(predicted[b, h, a]) - float(wanted[b, h, a])) ** 2
        for b in range(2)
        for h in range(HORIZON)
        for a in range(dims)
        if not is_pad[b, h]
    )
    assert squared_error(predicted, wanted, is_pad, dims) == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_samples_are_spread_evenly() -> None:
    assert metrics._evenly(range(10), 3) == [0, 4, 9]
    assert metrics._evenly([5, 7], 3) == [5, 7]
