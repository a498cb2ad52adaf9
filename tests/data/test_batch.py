"""From a frame to a batch: the chain of transforms, determinism, missing cameras, buckets, and the split by episode."""

import dataclasses
import json
import pathlib
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusevla.data.annotations import load_annotations
from fusevla.data.batch import bucket_for, collate, prompt_sample, split_episodes
from fusevla.data.lerobot import Episode, open_set
from fusevla.data.normalize import NormStats, array_stats, normalize
from fusevla.data.samples import SampleSource, used_cameras
from fusevla.data.transforms import stay_chunk
from fusevla.presets import TINY, DataConfig
from fusevla.tokens.tokenizer import train_tokenizer
from tests.references_text import episode_record

LIBERO = pathlib.Path(__file__).parents[3] / "shared" / "libero_sample"
TASKS = ("put the red block in the bowl", "open the drawer", "put the red block in the bowl", "open the drawer")
LENGTHS = (61, 65, 70, 62)
RECORDS = {str(i): episode_record(task) for i, task in enumerate(TASKS)}
TOKENIZER = train_tokenizer(
    [s[key] for r in RECORDS.values() for s in r["segments"] for key in ("content", "updated_content") if s[key]]
)
MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, image_size=28),
    vocab_size=TOKENIZER.vocab_size,
    action_dim=12,
    action_horizon=6,
)
DATA = DataConfig(max_token_len=160, text_buckets=(64, 96, 160))
STATE = np.random.default_rng(0).normal(size=(sum(LENGTHS), 8)).astype(np.float32)
ACTIONS = np.random.default_rng(1).normal(size=(sum(LENGTHS), 7)).astype(np.float32)
STATS = {"state": array_stats(STATE), "actions": array_stats(ACTIONS)}


class FakeSet:
    """A set in memory; the wrist camera has no image in every fifth row."""

    def __init__(self):
        self.cameras = {"left_wrist_0_rgb": "wrist_image", "base_0_rgb": "image"}
        self.episodes = tuple(Episode(i, length, task) for i, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)))
        self.root, self.state, self.actions = Path("memory"), STATE, ACTIONS
        self.starts = np.cumsum([0, *LENGTHS])

    def episode_slice(self, i):
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def locate(self, row):
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return i, row - int(self.starts[i])

    def picture(self, camera, row):
        if camera == "left_wrist_0_rgb" and row % 5 == 0:
            return None
        return Image.fromarray(np.random.default_rng([row, len(camera)]).integers(1, 256, size=(20, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    return write_annotations(tmp_path_factory.mktemp("cot"))


@pytest.fixture(scope="module")
def source(annotations):
    return make(annotations)


def write_annotations(folder, **extra):
    (folder / "cot_simple.json").write_text(json.dumps({**RECORDS, **extra}))
    return load_annotations(folder / "cot_simple.json")


def make(annotations, data=DATA, stats=STATS, frames=None, model=MODEL, **options):
    return SampleSource(frames or FakeSet(), annotations, TOKENIZER, stats, data, model, **options)


def find(source, kind, epoch=0, seed=0, episode=None):
    """The first index whose thought is of this kind."""
    for index in range(len(source)):
        row = int(source.rows[index])
        if source.thought(index, epoch, seed).kind == kind and episode in (None, source.frames.locate(row)[0]):
            return index
    raise AssertionError(f"no {kind} drawn")


def test_an_acting_sample_follows_the_order_of_transforms(annotations):
    source = make(annotations)
    index = find(source, "act", episode=1)
    sample = source(index, 0, 0)
    row = int(source.rows[index])
    state = normalize(STATE[row], STATS["state"])
    bins = np.clip(np.floor((state.astype(np.float64) + 1) * 128), 0, 255).astype(int)
    assert TOKENIZER.decode(sample.text.tokens) == f"{sample.thought.prefix}; State: {' '.join(map(str, bins))}"
    assert sample.text.clipped == int((np.abs(state) > 1).sum())
    np.testing.assert_array_equal(sample.state, [*state, 0, 0, 0, 0])
    assert sample.state.dtype == sample.actions.dtype == np.float32
    np.testing.assert_array_equal(sample.actions[:, :7], normalize(ACTIONS[row : row + 6], STATS["actions"]))
    assert not sample.actions[:, 7:].any()
    assert not sample.action_is_pad.any()
    assert list(sample.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    base = np.asarray(sample.images["base_0_rgb"])
    assert base.shape == (28, 28, 3)
    assert base.dtype == np.uint8
    assert not base[:7].any(), "padded above and below"
    assert base[7:21].any(axis=(1, 2)).all()
    assert (sample.episode, sample.frame) == (1, row - 61)


def test_actions_never_cross_the_end_of_an_episode(annotations):
    source = make(annotations, data=dataclasses.replace(DATA, use_reasoning=False))
    sample = source(58, 0, 0)
    assert sample.action_is_pad.tolist() == [False, False, False, True, True, True]
    np.testing.assert_array_equal(sample.actions[2:, :7], np.tile(normalize(ACTIONS[60], STATS["actions"]), (4, 1)))


def test_the_last_segment_stays(annotations):
    source = make(annotations)
    epoch = next(epoch for epoch in range(100) if source.thought(60, epoch, 0).stay)
    sample = source(60, epoch, 0)
    expected = normalize(np.array([0, 0, 0, 0, 0, 0, ACTIONS[60, 6]], np.float32), STATS["actions"])
    np.testing.assert_array_equal(sample.actions[:, :7], np.tile(expected, (6, 1)))
    assert not sample.action_is_pad.any()
    assert sample.text.diffusion


def test_staying_keeps_the_gripper_of_any_action_space():
    assert stay_chunk(np.array([3.0, 4.0, -1.0], np.float32), 2).tolist() == [[0, 0, -1], [0, 0, -1]]


def test_raw_values_without_statistics(annotations):
    source = make(annotations, stats=None)
    index = find(source, "act")
    sample = source(index, 0, 0)
    np.testing.assert_array_equal(sample.state[:8], STATE[source.rows[index]])
    np.testing.assert_array_equal(sample.actions[0, :7], ACTIONS[source.rows[index]])


@settings(max_examples=25)
@given(st.integers(0, sum(LENGTHS) - 1), st.integers(0, 5), st.integers(0, 5))
def test_a_sample_is_a_function_of_index_epoch_and_seed(source, index, epoch, seed):
    again = pickle.loads(pickle.dumps(source))
    first, second = collate([source(index, epoch, seed)], (160,)), collate([again(index, epoch, seed)], (160,))
    for left, right in zip(_leaves(first), _leaves(second), strict=True):
        np.testing.assert_array_equal(left, right)


def _leaves(batch):
    observation = batch.observation
    fields = (batch.token_loss_mask, batch.diffusion_loss_mask, batch.actions, batch.action_is_pad, observation.state)
    masks = (observation.tokens, observation.token_mask, observation.token_ar_mask)
    return [*fields, *masks, *observation.images.values(), *observation.image_masks.values()]


def test_the_draw_belongs_to_the_frame_not_to_the_selection(annotations):
    everything, one = make(annotations), make(annotations, episodes=[2])
    assert len(one) == LENGTHS[2]
    offset = LENGTHS[0] + LENGTHS[1]
    assert all(one.thought(i, 3, 4) == everything.thought(offset + i, 3, 4) for i in range(len(one)))
    assert {one(i, 0, 0).episode for i in (0, 30, 69)} == {2}


def test_draws_differ_between_epochs_and_seeds(source):
    thoughts = {
        (epoch, seed): [source.thought(i, epoch, seed) for i in range(len(source))] for epoch in (0, 1) for seed in (0, 1)
    }
    assert len({tuple(map(str, drawn)) for drawn in thoughts.values()}) == 4


def test_validation_draws_no_outdated_acting(annotations):
    source, validation = make(annotations), make(annotations, validation=True)
    drawn = {validation.thought(i, e, 0).kind for i in range(len(source)) for e in range(5)}
    trained = {source.thought(i, e, 0).kind for i in range(len(source)) for e in range(5)}
    assert drawn == {"reason", "reason_outdated", "act"}
    assert trained == drawn | {"act_outdated"}


@pytest.mark.parametrize("annotated", [True, False])
def test_without_reasoning_annotations_are_optional(annotations, annotated):
    source = make(annotations if annotated else None, data=dataclasses.replace(DATA, use_reasoning=False))
    sample = source(70, 0, 0)
    assert sample.thought.kind == "act"
    assert sample.thought.prefix.startswith("Instruction: open the drawer. \nPlan: TBD.")
    assert sample.thought.prefix.endswith("do: TBD.")
    assert set(source.report.longest) == {"act"}


def test_options_reach_the_samples(annotations):
    plain = make(annotations, data=dataclasses.replace(DATA, use_outdated_reasoning=False, supervise_act_decision=False))
    kinds = {plain.thought(i, e, 0).kind for i in range(len(plain)) for e in range(5)}
    assert kinds == {"reason", "act", "act_outdated"}
    assert not plain(find(plain, "act"), 0, 0).text.loss_mask.any()
    assert make(annotations)(find(make(annotations), "act"), 0, 0).text.loss_mask.sum() == 1


def test_vision_language_episodes_have_no_action_loss(tmp_path):
    annotations = write_annotations(tmp_path, vision_language_episode_idx=[1])
    source = make(annotations, episodes=[1])
    samples = [source(i, 0, 0) for i in range(0, len(source), 7)]
    assert {sample.thought.kind for sample in samples} == {"reason"}
    assert len({sample.thought.target for sample in samples}) == 3
    silent = make(annotations, episodes=[1], data=dataclasses.replace(DATA, use_reasoning=False))
    assert not collate([*samples, silent(0, 0, 0)], DATA.text_buckets).diffusion_loss_mask.any()


def test_wrist_images_can_be_left_out(annotations):
    data = dataclasses.replace(DATA, use_wrist_image=False)
    assert used_cameras(data) == ("base_0_rgb",)
    assert list(collate([make(annotations, data=data)(0, 0, 0)], (160,)).observation.images) == ["base_0_rgb"]
    three = dataclasses.replace(DATA, cameras=("right_wrist_0_rgb", "left_wrist_0_rgb", "base_0_rgb"))
    assert used_cameras(three) == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert make(annotations, data=three).cameras == ("base_0_rgb", "left_wrist_0_rgb"), "a camera the set lacks is absent"


def test_a_batch_stacks_masks_and_pads(source):
    samples = [source(find(source, kind), 0, 0) for kind in ("reason", "act", "act_outdated", "reason_outdated")] + [
        source(5, 0, 0)
    ]
    batch = collate(samples, (96, 64, 160))
    observation = batch.observation
    longest = max(len(sample.text.tokens) for sample in samples)
    assert observation.tokens.shape == (5, bucket_for(longest, (64, 96, 160)))
    for i, sample in enumerate(samples):
        n = len(sample.text.tokens)
        assert observation.tokens[i, :n].tolist() == sample.text.tokens.tolist()
        assert observation.token_mask[i].tolist() == [True] * n + [False] * (observation.tokens.shape[1] - n)
        assert observation.token_ar_mask[i, :n].tolist() == sample.text.ar_mask.tolist()
        assert batch.token_loss_mask[i, :n].tolist() == sample.text.loss_mask.tolist()
        for padded in (observation.tokens, observation.token_ar_mask, batch.token_loss_mask):
            assert not padded[i, n:].any()
        missing = sample.images["left_wrist_0_rgb"] is None
        assert observation.image_masks["left_wrist_0_rgb"][i] == (not missing)
        assert observation.images["left_wrist_0_rgb"][i].any() == (not missing)
    assert batch.diffusion_loss_mask[:4].tolist() == [False, True, True, False]
    assert list(observation.images) == list(observation.image_masks) == ["base_0_rgb", "left_wrist_0_rgb"]
    dtypes = [observation.tokens.dtype, observation.state.dtype, batch.actions.dtype, observation.images["base_0_rgb"].dtype]
    assert dtypes == [np.int32, np.float32, np.float32, np.uint8]
    assert not observation.image_masks["left_wrist_0_rgb"].all()
    assert observation.image_masks["base_0_rgb"].all()


def test_a_camera_that_only_some_samples_name_is_masked_in_the_others(annotations):
    sample = make(annotations)(1, 0, 0)
    other = dataclasses.replace(sample, images={"base_0_rgb": sample.images["base_0_rgb"]})
    observation = collate([sample, other], (160,)).observation
    assert observation.image_masks["left_wrist_0_rgb"].tolist() == [True, False]
    alone = collate([other], (160,), sample.images).observation
    assert alone.image_masks["left_wrist_0_rgb"].tolist() == [False]
    assert jax.tree.map(np.shape, alone) == jax.tree.map(np.shape, collate([sample], (160,)).observation)
    blind = dataclasses.replace(sample, images={"base_0_rgb": None})
    with pytest.raises(ValueError, match="expected at least one image in the batch, got none of base_0_rgb"):
        collate([blind], (160,))


@pytest.mark.parametrize(("length", "bucket"), [(1, 64), (64, 64), (65, 96), (160, 160)])
def test_the_smallest_bucket_that_fits(length, bucket):
    assert bucket_for(length, (160, 64, 96)) == bucket


def test_texts_that_fit_no_bucket():
    with pytest.raises(ValueError, match=r"expected at most 160 tokens .*got 161"):
        bucket_for(161, (64, 160))
    with pytest.raises(ValueError, match="expected at least one sample"):
        collate([], (64,))


@pytest.mark.parametrize(("max_token_len", "buckets"), [(70, (64, 70)), (200, (64, 70))])
def test_long_texts_are_truncated_by_protocol_and_counted(annotations, max_token_len, buckets):
    source = make(annotations, data=dataclasses.replace(DATA, max_token_len=max_token_len, text_buckets=buckets))
    assert source.max_len == 70
    assert source.report.truncated > 0
    assert max(source.report.longest.values()) > 70
    assert "lose prompt text" in str(source.report)
    samples = [source(i, e, 0) for i in range(0, len(source), 5) for e in range(3)]
    cut = [sample for sample in samples if sample.text.truncated]
    assert cut
    for sample in cut:
        assert len(sample.text.tokens) <= 70
        assert TOKENIZER.ids.eop in sample.text.tokens
        if sample.thought.kind == "reason":
            assert TOKENIZER.decode(sample.text.tokens[sample.text.loss_mask]) == sample.thought.target
    collate(samples, buckets)


def test_a_thought_that_never_fits_is_found_before_training(annotations):
    with pytest.raises(ValueError, match="raise max_token_len"):
        make(annotations, data=dataclasses.replace(DATA, max_token_len=40))


def test_the_report_counts_what_it_says(source):
    drawn = [source(i, e, 0) for i in range(0, len(source), 3) for e in range(3)]
    for kind in ("reason", "act", "act_outdated", "reason_outdated"):
        lengths = [len(sample.text.tokens) for sample in drawn if sample.thought.kind == kind]
        assert max(lengths, default=0) <= source.report.longest[kind]
    assert source.report.truncated == 0
    assert source.report.values == STATE.size
    assert source.report.clipped == int((np.abs(normalize(STATE, STATS["state"])) > 1).sum()) > 0
    assert "are clipped in the prompt" in str(source.report)


def test_what_does_not_fit_together_is_one_error(annotations):
    model = dataclasses.replace(MODEL, action_dim=7, vocab_size=1000)
    data = dataclasses.replace(DATA, cameras=("front",))
    with pytest.raises(ValueError, match="samples cannot be made") as error:
        make(None, data=data, model=model, stats={"state": STATS["state"]}, episodes=[])
    for part in (
        "state: expected at most action_dim = 7 dimensions, got 8",
        "statistics: expected an entry 'actions', got ['state']",
        f"tokenizer: expected the model's vocabulary of 1000, got {TOKENIZER.vocab_size}",
        "cameras: expected one of ['front'] in the set, got ['base_0_rgb', 'left_wrist_0_rgb']",
        "episodes: expected at least one",
        "annotations: expected a cot_simple.json",
    ):
        assert part in str(error.value)


def test_episodes_without_annotation_are_found_at_the_start(annotations):
    fewer = dataclasses.replace(annotations, episodes={0: annotations.episodes[0]})
    with pytest.raises(ValueError, match="episode 2: expected an annotation"):
        make(fewer)
    assert len(make(fewer, episodes=[0])) == 61


@pytest.mark.parametrize("index", [-1, sum(LENGTHS)])
def test_no_such_sample(annotations, index):
    with pytest.raises(IndexError, match=f"sample {index} of a source with {sum(LENGTHS)}"):
        make(annotations)(index, 0, 0)


def test_the_prompt_of_a_robot_is_the_prompt_of_training(source):
    index = find(source, "act", episode=1)
    row = int(source.rows[index])
    trained = source(index, 0, 0)
    frames = {camera: np.asarray(source.frames.picture(camera, row)) for camera in source.cameras}
    asked = prompt_sample(frames | {"other": None}, STATE[row], trained.thought.prefix, TOKENIZER, STATS, DATA, MODEL)
    assert asked.text.tokens.tolist() == trained.text.tokens[:-1].tolist()
    assert asked.text.tokens[-1] == TOKENIZER.ids.eop
    left, right = (collate([sample], (160,)).observation for sample in (trained, asked))
    np.testing.assert_array_equal(left.state, right.state)
    for camera in source.cameras:
        np.testing.assert_array_equal(left.images[camera], right.images[camera])
        assert left.image_masks[camera] == right.image_masks[camera]
    assert not right.token_ar_mask.any()
    alone = collate([prompt_sample({"base_0_rgb": frames["base_0_rgb"]}, STATE[row], "x", TOKENIZER, STATS, DATA, MODEL)], (160,))
    assert not alone.observation.image_masks["left_wrist_0_rgb"].any()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.floats(0, 0.99), st.integers(0, 9))
def test_the_split_is_by_episode_and_deterministic(tasks, fraction, seed):
    episodes = [Episode(i, 1, task) for i, task in enumerate(tasks)]
    train, held_out = split_episodes(episodes, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(len(tasks)))
    assert (train, held_out) == split_episodes(episodes, fraction, seed)
    if len(tasks) > 1 and fraction > 0:
        assert held_out
        assert train
    if fraction == 0 or len(tasks) < 2:
        assert not held_out
    if len(held_out) <= len(tasks) - len(set(tasks)):
        assert {tasks[i] for i in train} == set(tasks), "no task loses all its training episodes while another has spare ones"


def test_the_split_refuses_to_hold_out_everything():
    with pytest.raises(ValueError, match=r"held_out_fraction: expected 0 <= fraction < 1, got 1.0"):
        split_episodes([], 1.0)


@pytest.mark.skipif(not LIBERO.is_dir(), reason="no sample data")
def test_real_frames_become_a_batch():
    frames = open_set(LIBERO)
    annotations = load_annotations(LIBERO / "cot_simple.json")
    tokenizer = train_tokenizer([s.content for e in annotations.episodes.values() for s in e.segments])
    stats = {"state": array_stats(frames.state), "actions": array_stats(frames.actions)}
    model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    train, held_out = split_episodes(frames.episodes, 0.1)
    assert (len(train), len(held_out)) == (11, 1)
    source = SampleSource(frames, annotations, tokenizer, stats, DataConfig(), model, episodes=train)
    batch = collate([pickle.loads(pickle.dumps(source))(i, 0, 42) for i in (0, 50, 300, 1000)], DataConfig().text_buckets)
    assert batch.observation.images["base_0_rgb"].shape == (4, 224, 224, 3)
    assert batch.observation.state.shape == (4, 32)
    assert batch.actions.shape == (4, 16, 32)
    assert batch.observation.tokens.shape[1] in (128, 192)
    assert isinstance(stats["state"], NormStats)
    assert source.report.truncated == 0
