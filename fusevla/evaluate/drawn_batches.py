"""Batches for benchmarks: everything drawn at random but the lengths of texts, which are those of a real set."""

import numpy as np

from fusevla.arrays import Batch
from fusevla.data.annotations import Thought
from fusevla.data.batch import collate
from fusevla.data.samples import Sample
from fusevla.presets import Preset
from fusevla.tokens.protocol import TokenizedText, protocol_ids

__all__ = ["LONGEST_PROMPT_AND_THOUGHT", "PROMPT_AND_THOUGHT", "PROMPT_OF_ACT", "draw_batches"]

PROMPT_OF_ACT = (84, 84, 86, 89, 90, 90, 90, 91, 92, 95, 96, 99, 100, 101, 101, 102)
"""Tokens from BOS to END_OF_PREFIX of acting samples (then comes one more): 16 quantiles of 11,975."""
PROMPT_AND_THOUGHT = (
    *((68, 40), (69, 40), (69, 40), (69, 43), (70, 43), (70, 43), (70, 43), (70, 43)),
    *((71, 43), (72, 43), (84, 47), (85, 47), (90, 51), (91, 51), (92, 51), (101, 59)),
)
"""The same of reasoning samples, and tokens from BEGIN_OF_REASONING to EOS: 16 quantiles by length of 1,113.

All from 12 episodes (1,636 frames) of libero-10 with its annotations, 8 epochs of draws with the preset's options, by the
vocabulary of Gemma (256,000 pieces), which is PaliGemma's for text."""
LONGEST_PROMPT_AND_THOUGHT = (101, 60)
"""The longest of these samples, which one batch of 16 in 14 has."""


def draw_batches(preset: Preset, count: int, seed: int, *, with_longest: bool = False) -> list[Batch]:
    """``count`` batches of the preset's size, half of each reasoning; pictures, words and actions are random.

    ``with_longest`` puts the longest sample into each: what decides about memory.
    """
    rng, size = np.random.default_rng(seed), preset.train.batch_size
    batches = []
    for _ in range(count):
        acting = [(int(rng.choice(PROMPT_OF_ACT)), 1) for _ in range(size // 2)]
        thinking = [tuple(map(int, rng.choice(PROMPT_AND_THOUGHT))) for _ in range(size // 2)]
        thinking[:1] = [LONGEST_PROMPT_AND_THOUGHT] if with_longest else thinking[:1]
        samples = [draw_sample(rng, preset, *lengths) for lengths in (*thinking, *acting)]
        batches.append(collate(samples, preset.data.text_buckets))
    return batches


def draw_sample(rng: np.random.Generator, preset: Preset, prompt: int, suffix: int) -> Sample:
    """A sample of ``prompt + suffix`` tokens; it acts where the suffix is one token."""
    model, acts = preset.model, suffix == 1
    ids, length, side = protocol_ids(model.vocab_size), prompt + suffix, model.vision.image_size
    tokens = rng.integers(3, ids.bor, length).astype(np.int32)
    tokens[[0, prompt - 1, prompt]] = ids.bos, ids.eop, ids.boa if acts else ids.bor
    causal = np.arange(length) >= prompt
    shape = (model.action_horizon, model.action_dim)
    return Sample(
        images={name: rng.integers(0, 256, (side, side, 3), np.uint8) for name in preset.data.cameras},
        state=rng.standard_normal(model.action_dim, np.float32),
        text=TokenizedText(tokens, np.ones(length, bool), causal, causal, diffusion=acts),
        actions=rng.standard_normal(shape, np.float32),
        action_is_pad=np.zeros(model.action_horizon, bool),
        thought=Thought("", None if acts else "", "act" if acts else "reason"),
    )
