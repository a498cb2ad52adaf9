"""From a frame of a set to a sample: the chain of transforms, in the order that training and inference share.

choose the thought -> images as uint8 [H, W, 3] -> normalise state and actions -> resize with padding -> tokenise with the
digitised state (normalised, not yet padded) -> pad state and actions to ``action_dim``. ``batch.collate`` does the rest.
Source: DESIGN section 5 ("Order of transforms").
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from fusevla.arrays import Bool, Float, Int, UInt8
from fusevla.data.annotations import (
    TRAIN_KEEP_REASON,
    VALIDATION_KEEP_REASON,
    Annotations,
    Thought,
    act_only_prefix,
    check_annotations,
    choose_thought,
    draw_pair,
    possible_thoughts,
)
from fusevla.data.frame_cache import open_cache
from fusevla.data.lerobot import Episode
from fusevla.data.normalize import NormStats, normalize
from fusevla.data.text_report import TextReport, measure_text
from fusevla.data.transforms import action_chunk, pad_dim, resize_with_pad, stay_chunk
from fusevla.presets import DataConfig, ModelConfig
from fusevla.tokens.protocol import TokenizedText, digitize_state, encode_prompt, encode_sample
from fusevla.tokens.tokenizer import Tokenizer

__all__ = ["FrameSet", "Sample", "SampleSource", "Stats", "prompt_sample", "used_cameras"]

Stats = Mapping[str, NormStats]


@runtime_checkable
class FrameSet(Protocol):
    """What this module needs of a set; ``fusevla.data.lerobot.LeRobotSet`` is one."""

    root: Path
    state: Float[np.ndarray, "n a"]
    actions: Float[np.ndarray, "n a"]

    @property
    def cameras(self) -> Mapping[str, str]:
        """Camera name -> column."""
        ...

    @property
    def episodes(self) -> Sequence[Episode]:
        """Ascending by number."""
        ...

    def episode_slice(self, i: int) -> slice:
        """Rows of the episode at position ``i``."""
        ...

    def locate(self, row: int) -> tuple[int, int]:
        """(position of the episode, frame in it) of a row."""
        ...

    def picture(self, camera: str, row: int) -> Image.Image | None:
        """One frame in RGB; None where the set has none for this row."""
        ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before batching: everything has its final size but the text."""

    images: dict[str, UInt8[np.ndarray, "size size 3"] | None]
    """None where the camera is missing in this sample."""
    state: Float[np.ndarray, " a"]
    text: TokenizedText
    actions: Float[np.ndarray, "h a"]
    action_is_pad: Bool[np.ndarray, " h"]
    thought: Thought
    episode: int = -1
    """Number of the episode (not its position)."""
    frame: int = -1


class SampleSource:
    """Random access to the samples of some episodes; picklable, so worker processes can hold one.

    ``source(index, epoch, seed)`` is a pure function of its arguments: order, workers and repetition change nothing.
    """

    def __init__(
        self,
        frames: FrameSet,
        annotations: Annotations | None,
        tokenizer: Tokenizer,
        stats: Stats | None,
        data: DataConfig,
        model: ModelConfig,
        episodes: Sequence[int] | None = None,
        validation: bool = False,
    ):
        """Checks everything that can be checked without decoding an image.

        Args:
            frames: An opened set.
            annotations: None only without reasoning (then the prompt is made of the episode's task).
            tokenizer: Its vocabulary must be the model's.
            stats: Statistics of ``state`` and ``actions``; None trains on raw values.
            data: Options of the chain.
            model: For the sizes: image, action_dim, action_horizon, vocabulary.
            episodes: Positions in ``frames.episodes``; all by default.
            validation: Draw as validation does: a thinking frame never acts on the outdated thought.

        Raises:
            ValueError: sizes that do not fit together, no camera, no episode, annotations missing or not fitting the set, a
                thought that no prompt can precede within the text limit, or a frame cache that cannot be written.
        """
        self.frames, self.annotations, self.tokenizer, self.stats = frames, annotations, tokenizer, stats
        self.data, self.model, self.validation = data, model, validation
        self.episodes = tuple(range(len(frames.episodes)) if episodes is None else episodes)
        self.cameras = tuple(camera for camera in used_cameras(data) if camera in frames.cameras)
        self.max_len = min(data.max_token_len, max(data.text_buckets))
        self._check()
        folder, size = data.frame_cache, model.vision.image_size
        self.cache = None if folder is None else open_cache(folder, frames.root, self.cameras, size)
        self.rows: Int[np.ndarray, " n"] = self._rows(self.episodes)
        states = _normalized(frames.state[self.rows], stats, "state")
        widest = np.ones(states.shape[-1])
        self.report: TextReport = measure_text(
            self._thoughts(), lambda thought: self._text(thought, widest), states, self.max_len
        )

    def __len__(self) -> int:
        """Samples of one epoch: the frames of the chosen episodes."""
        return len(self.rows)

    @property
    def acting_rows(self) -> Int[np.ndarray, " m"]:
        """The rows whose actions can be trained: those of all but the vision-language episodes. Perhaps none."""
        thinking = self.annotations.vision_language if self.annotations else frozenset()
        return self._rows([i for i in self.episodes if self.frames.episodes[i].index not in thinking])

    def thought(self, index: int, epoch: int, seed: int) -> Thought:
        """What sample ``index`` says in this epoch."""
        row = int(self.rows[index])
        position, frame = self.frames.locate(row)
        episode = self.frames.episodes[position]
        if self.annotations is None or (not self.data.use_reasoning and episode.index not in self.annotations.episodes):
            return Thought(act_only_prefix(episode.task), None, "act")
        r1, r2 = draw_pair(seed, epoch, row)
        return choose_thought(
            self.annotations.episodes[episode.index],
            frame,
            episode.length,
            r1,
            r2,
            use_reasoning=self.data.use_reasoning,
            use_outdated_reasoning=self.data.use_outdated_reasoning,
            vision_language=episode.index in self.annotations.vision_language,
            keep_reason=VALIDATION_KEEP_REASON if self.validation else TRAIN_KEEP_REASON,
        )

    def __call__(self, index: int, epoch: int, seed: int) -> Sample:
        """Sample ``index`` (0 to ``len(self) - 1``) as it is drawn in ``epoch``.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a source with {len(self)}")
        row = int(self.rows[index])
        position, frame = self.frames.locate(row)
        thought = self.thought(index, epoch, seed)
        chunk, is_pad = self._actions(position, frame, thought.stay)
        state = _normalized(self.frames.state[row], self.stats, "state")
        return Sample(
            images={camera: self._image(camera, row) for camera in self.cameras},
            state=pad_dim(state, self.model.action_dim),
            text=self._text(thought, state),
            actions=pad_dim(_normalized(chunk, self.stats, "actions"), self.model.action_dim),
            action_is_pad=is_pad,
            thought=thought,
            episode=self.frames.episodes[position].index,
            frame=frame,
        )

    def _image(self, camera: str, row: int) -> UInt8[np.ndarray, "size size 3"] | None:
        kept = None if self.cache is None else self.cache.get(camera, row)
        if kept is not None:
            return kept
        pixels = _resized(self.frames.picture(camera, row), self.model.vision.image_size)
        if self.cache is not None and pixels is not None:
            self.cache.put(camera, row, pixels)
        return pixels

    def _actions(self, position: int, frame: int, stay: bool) -> tuple[np.ndarray, np.ndarray]:
        actions = self.frames.actions[self.frames.episode_slice(position)]
        if stay:
            return stay_chunk(actions[-1], self.model.action_horizon), np.zeros(self.model.action_horizon, bool)
        return action_chunk(actions, frame, self.model.action_horizon)

    def _text(self, thought: Thought, state: np.ndarray) -> TokenizedText:
        bins, clipped = digitize_state(state)
        supervise = self.data.supervise_act_decision
        text = encode_sample(self.tokenizer, thought.prefix, bins, thought.target, thought.kind, self.max_len, supervise)
        # Vision-language episodes never train actions, even where reasoning is off and the sample acts.
        return dataclasses.replace(text, diffusion=thought.actions, clipped=clipped)

    def _rows(self, positions: Sequence[int]) -> Int[np.ndarray, " n"]:
        spans = map(self.frames.episode_slice, positions)
        return np.concatenate([np.arange(0), *(np.arange(span.start, span.stop) for span in spans)])

    def _check(self) -> None:
        problems = []
        action_dim, vocab_size = self.model.action_dim, self.model.vocab_size
        for name, table in (("state", self.frames.state), ("actions", self.frames.actions)):
            if table.shape[-1] > action_dim:
                problems.append(f"{name}: expected at most action_dim = {action_dim} dimensions, got {table.shape[-1]}")
            if self.stats is not None and name not in self.stats:
                problems.append(f"statistics: expected an entry {name!r}, got {sorted(self.stats)}")
        if self.tokenizer.vocab_size != vocab_size:
            problems.append(f"tokenizer: expected the model's vocabulary of {vocab_size}, got {self.tokenizer.vocab_size}")
        if not self.cameras:
            problems.append(f"cameras: expected one of {list(self.data.cameras)} in the set, got {sorted(self.frames.cameras)}")
        if not self.episodes:
            problems.append("episodes: expected at least one, got none")
        if self.annotations is None and self.data.use_reasoning:
            problems.append("annotations: expected a cot_simple.json, got none; give one or set use_reasoning=False")
        if problems:
            raise ValueError("samples cannot be made:\n" + "\n".join(f"  {problem}" for problem in problems))
        if self.annotations is not None and self.data.use_reasoning:
            used = (self.frames.episodes[i] for i in self.episodes)
            check_annotations(self.annotations, {episode.index: episode.length for episode in used})

    def _thoughts(self) -> Iterable[Thought]:
        """Everything that can be drawn, each once, in a fixed order."""
        found: dict[Thought, None] = {}
        for episode in (self.frames.episodes[i] for i in self.episodes):
            annotation = self.annotations.episodes.get(episode.index) if self.annotations else None
            if annotation is None or self.annotations is None:
                found[Thought(act_only_prefix(episode.task), None, "act")] = None
                continue
            thoughts = possible_thoughts(
                annotation,
                use_reasoning=self.data.use_reasoning,
                use_outdated_reasoning=self.data.use_outdated_reasoning,
                vision_language=episode.index in self.annotations.vision_language,
            )
            found |= dict.fromkeys(sorted(thoughts, key=lambda t: (t.prefix, t.target or "", t.kind, t.stay)))
        return found


def used_cameras(data: DataConfig) -> tuple[str, ...]:
    """The cameras of a preset, ordered by name; without the wrist's where ``use_wrist_image`` is off."""
    return tuple(sorted(camera for camera in data.cameras if data.use_wrist_image or "wrist" not in camera))


def prompt_sample(
    images: Mapping[str, UInt8[np.ndarray, "height width 3"] | None],
    state: Float[np.ndarray, " a"],
    prefix: str,
    tokenizer: Tokenizer,
    stats: Stats | None,
    data: DataConfig,
    model: ModelConfig,
) -> Sample:
    """The same chain for a robot's observation: a sample that ends with END_OF_PREFIX, with zero actions.

    Args:
        images: By camera, any size; other cameras than the preset's are ignored, missing ones are masked.
        state: As the robot gives it (not normalised).
        prefix: Instruction and latest thought (``initial_content``, ``with_instruction``), or ``act_only_prefix``.
        tokenizer, stats, data, model: As in training.

    ``collate([sample], buckets).observation`` is what the policy takes.
    """
    normal = _normalized(np.asarray(state, np.float32), stats, "state")
    return Sample(
        images={camera: _resized(images.get(camera), model.vision.image_size) for camera in used_cameras(data)},
        state=pad_dim(normal, model.action_dim),
        text=encode_prompt(tokenizer, prefix, normal, min(data.max_token_len, max(data.text_buckets))),
        actions=np.zeros((model.action_horizon, model.action_dim), np.float32),
        action_is_pad=np.ones(model.action_horizon, bool),
        thought=Thought(prefix, None, "act", actions=False),
    )


def _normalized(x: np.ndarray, stats: Stats | None, key: str) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x if stats is None else normalize(x, stats[key])


def _resized(image: np.ndarray | Image.Image | None, size: int) -> UInt8[np.ndarray, "size size 3"] | None:
    return None if image is None else resize_with_pad(image, size, size)
