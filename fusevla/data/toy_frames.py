"""Frames of the toy's base episodes as training samples, drawn as they are needed: what the toy base learns from.

Most samples act. Some read instead: they repeat the instruction as text. That keeps the language expert a language model, one
that can say a word it has read, as the published base can; nothing in it is a plan.
"""

from typing import Final

import numpy as np

from fusevla.arrays import Batch, Bool, Float, Int
from fusevla.data.annotations import Thought, act_only_prefix
from fusevla.data.batch import collate
from fusevla.data.normalize import normalize
from fusevla.data.samples import Sample
from fusevla.data.toy import episodes, norm_stats, subgoal
from fusevla.data.toy_world import COLORS, TABLE, draw, state
from fusevla.data.transforms import action_chunk
from fusevla.presets import TOY_MODEL
from fusevla.tokens.protocol import digitize_state, encode_sample
from fusevla.tokens.tokenizer import Tokenizer

Places = tuple[Float[np.ndarray, "b l 4"], Bool[np.ndarray, "b l"]]
"""Per text token: where the thing is that it names, and whether it names one."""
TEXT_LENGTH: Final = 36
"""Every act-only prompt of the toy fits, and its instruction once more."""
READING: Final = 0.25
"""Share of the samples that repeat their instruction as text and do not act."""


class Frames:
    """Random access to the frames of base episodes as training samples."""

    def __init__(self, tokenizer: Tokenizer, count: int, seed: int):
        self.tokenizer = tokenizer
        self.episodes = list(episodes("base", count, seed))
        self.names = {color: int(tokenizer.encode(subgoal(color))[1]) for color in COLORS}
        self.tray = int(tokenizer.encode(subgoal("red"))[2])
        # what follows the placing is waiting: two frames of it are enough; finding the block is the hard part: three times
        self.rows = [
            (i, t)
            for i, episode in enumerate(self.episodes)
            for t in range(episode.placed_at[0] + 2)
            for _ in range(1 if episode.plan[0] in (episode.worlds[t].held, *episode.worlds[t].placed) else 3)
        ]

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Batch, Places]:
        """``size`` random frames, and where the things are that their prompts name."""
        rows = [self.rows[i] for i in rng.integers(len(self.rows), size=size)]
        batch = collate([self._sample(i, t, rng.random() < READING) for i, t in rows], [TEXT_LENGTH])
        return batch, self._places(rows, np.where(batch.observation.token_ar_mask, 0, batch.observation.tokens))

    def _places(self, rows: list[tuple[int, int]], tokens: Int[np.ndarray, "b l"]) -> Places:
        """For every token that names a thing: its offset from the gripper and its place on the table, about -1 to 1."""
        where, named = np.zeros((*tokens.shape, 4), np.float32), np.zeros(tokens.shape, bool)
        for row, (index, frame) in enumerate(rows):
            world = self.episodes[index].worlds[frame]
            things = dict(zip((self.names[color] for color in world.colors), world.blocks, strict=True)) | {self.tray: world.tray}
            for token, centre in things.items():
                named[row, tokens[row] == token] = True
                where[row, tokens[row] == token] = [*(centre - world.gripper) / 2, *(2 * centre / TABLE - 1)]
        return where, named

    def _sample(self, index: int, frame: int, reads: bool) -> Sample:
        episode, stats = self.episodes[index], norm_stats()
        prefix, target = act_only_prefix(episode.task), episode.task if reads else None
        thought = Thought(prefix, target, "reason" if reads else "act", actions=not reads)
        felt = normalize(state(episode.worlds[frame]), stats["state"])
        actions, is_pad = action_chunk(normalize(episode.actions, stats["actions"]), frame, TOY_MODEL.action_horizon)
        return Sample(
            images=dict(draw(episode.worlds[frame])),
            state=felt.astype(np.float32),
            text=encode_sample(self.tokenizer, prefix, digitize_state(felt)[0], target, thought.kind, TEXT_LENGTH),
            actions=actions.astype(np.float32),
            action_is_pad=is_pad,
            thought=thought,
            episode=index,
            frame=frame,
        )
