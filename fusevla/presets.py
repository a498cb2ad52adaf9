"""Every size and every option, as frozen dataclasses, and the presets that name the useful combinations of them.

Sizes: openpi ``src/openpi/models/{gemma,siglip,pi0}.py``@15a9616a. Recipe: "Do What You Say" (Wu et al. 2025) and DESIGN
tables of this repository's README.
"""

import dataclasses
from pathlib import Path
from typing import Literal

Freeze = Literal["llm", "all_but_lora", "none"]
Remat = Literal["none", "dots", "full"]
Base = Literal["bf16", "int8", "nf4"]
Attention = Literal["auto", "plain", "xla", "cudnn"]
Moments = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on the attention and feed-forward matrices of one expert."""

    rank: int
    alpha: float
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank."""
    attention: bool = True
    feed_forward: bool = True
    scale_feed_forward: bool = True
    """False reads checkpoints trained with openpi's feed-forward LoRA, which ignores the scale (same when alpha == rank)."""

    @property
    def scale(self) -> float:
        """The factor in ``y = x W + scale * (x A) B``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """One Gemma expert. Depth, heads and head_dim agree between the experts, widths may differ."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    lora: LoraConfig | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A SigLIP tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224
    float32_softmax: bool = True
    """False reproduces openpi's tower, whose softmax runs in the compute dtype (no difference in float32)."""

    @property
    def num_tokens(self) -> int:
        """Tokens per camera."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a ``Pi0Fuse``."""

    vision: VisionConfig
    language: ExpertConfig
    action: ExpertConfig
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; softmax, norm variances, RoPE, losses and the action heads are float32 whatever this says."""
    attention: Attention = "xla"
    """``auto`` is for presets: what is best on the device that runs them, chosen (and checked) at the start of a run."""
    remat: Remat = "full"


def without_lora(config: ModelConfig) -> ModelConfig:
    """The same sizes with no adapters: what the published base checkpoint holds."""
    return dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, lora=None),
        action=dataclasses.replace(config.action, lora=None),
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which frames, which cameras, which texts."""

    data: str | None = None
    """A LeRobot folder (v2.0, v2.1 or v3.0)."""
    annotations: str | None = None
    """cot_simple.json; by default the one inside ``data``."""
    more_data: tuple[str, ...] = ()
    """Further folders to mix in, each with its annotations inside."""
    data_weights: tuple[float, ...] = ()
    """How often each set is drawn, relative to the others, ``data`` first; empty: every frame of every set as often."""
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb")
    columns: tuple[tuple[str, str], ...] = ()
    """(name, column) pairs for columns that are not recognised; names: the cameras, ``state``, ``actions``."""
    use_reasoning: bool = True
    use_wrist_image: bool = True
    use_outdated_reasoning: bool = True
    supervise_act_decision: bool = True
    mask_padded_actions: bool = True
    max_token_len: int = 415
    text_buckets: tuple[int, ...] = (128, 160, 192, 256, 320, 415)
    """Text is padded to the first of these that fits the longest sample of a batch; the last one is ``max_token_len``."""
    norm: str = "auto"
    """``auto`` (norm_stats.json of the folder, computed when absent, or over all sets where they are several), ``none`` (raw
    values) or a norm_stats.json."""
    held_out_fraction: float = 0.1
    """Share of episodes kept for validation (at least one where there are two)."""
    workers: int = 0
    frame_cache: str | None = None
    """A folder on a fast disk for decoded, resized frames (150 kB each at 224 pixels); None decodes them anew every time."""

    @property
    def sets(self) -> tuple[tuple[str, str], ...]:
        """(folder, annotations) of every set, ``data`` first; None given, the annotations lie inside."""
        folders = (() if self.data is None else (self.data,)) + self.more_data
        inside = [str(Path(folder) / "cot_simple.json") for folder in folders]
        return tuple(zip(folders, inside if self.annotations is None else [self.annotations, *inside[1:]], strict=True))


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Train-time augmentation on the device; zero or one everywhere means off."""

    crop: float = 0.95
    rotate_degrees: float = 5.0
    brightness: float = 0.3
    contrast: float = 0.4
    saturation: float = 0.5


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up from peak/(warmup+1), then cosine decay (``optax.warmup_cosine_decay_schedule``)."""

    peak: float = 5e-5
    end: float = 5e-6
    warmup_steps: int = 300
    decay_steps: int = 10_000


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    steps: int = 10_000
    batch_size: int = 4
    schedule: ScheduleConfig = ScheduleConfig()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    ema_decay: float | None = None
    freeze: Freeze = "llm"
    base: Base = "bf16"
    """How frozen matrices are stored; int8 and NF4 are read back into the compute dtype layer by layer."""
    moments: Moments = "float32"
    """How the optimizer keeps its two moments of the image tower, where that trains; all others are float32."""
    accumulate: int = 1
    """Parts that a batch is divided into, one after the other in memory; the gradient is that of the whole batch."""
    diffusion_loss_coeff: float = 1.0
    flow_draws: int = 1
    augment: AugmentConfig | None = AugmentConfig()
    seed: int = 42
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named, complete job."""

    name: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    num_steps: int = 10
    """Euler steps of the action sampler."""


def scratch_schedule(steps: int) -> ScheduleConfig:
    """For random weights: peak 1e-3, warm-up min(100, steps/10), cosine to a tenth of the peak over ``steps``."""
    return ScheduleConfig(peak=1e-3, end=1e-4, warmup_steps=min(100, steps // 10), decay_steps=steps)


PI05 = ModelConfig(
    vision=VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    language=ExpertConfig(width=2048, depth=18, mlp_dim=16384, lora=LoraConfig(rank=16, alpha=16.0)),
    action=ExpertConfig(width=1024, depth=18, mlp_dim=4096, lora=LoraConfig(rank=32, alpha=32.0)),
)
"""The published sizes: 3,353,433,872 parameters and 49,987,584 of LoRA."""

FULL = dataclasses.replace(PI05, attention="auto")
"""The published sizes on whatever device there is."""

TINY = ModelConfig(
    vision=VisionConfig(width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=28),
    language=ExpertConfig(width=128, depth=4, mlp_dim=256, num_heads=4, head_dim=32, lora=LoraConfig(rank=8, alpha=8.0)),
    action=ExpertConfig(width=64, depth=4, mlp_dim=128, num_heads=4, head_dim=32, lora=LoraConfig(rank=8, alpha=8.0)),
    vocab_size=1024,
    dtype="float32",
    remat="none",
)
"""The same architecture for a laptop; its vocabulary follows the tokenizer."""

SMALL = ModelConfig(
    vision=VisionConfig(width=128, depth=3, mlp_dim=256, num_heads=4, patch_size=16, image_size=112),
    language=ExpertConfig(width=128, depth=4, mlp_dim=256, num_heads=4, head_dim=32, lora=LoraConfig(rank=8, alpha=8.0)),
    action=ExpertConfig(width=96, depth=4, mlp_dim=192, num_heads=4, head_dim=32, lora=LoraConfig(rank=8, alpha=8.0)),
    vocab_size=1024,
    dtype="float32",
    attention="plain",
    remat="none",
)
"""One task of LIBERO from nothing, at half the resolution, within an hour of two CPU cores."""

TOY_MODEL = ModelConfig(
    vision=VisionConfig(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=12, image_size=60),
    language=ExpertConfig(width=96, depth=4, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=32, lora=LoraConfig(32, 256.0)),
    action=ExpertConfig(width=64, depth=4, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32, lora=LoraConfig(16, 128.0)),
    vocab_size=718,
    action_dim=3,
    action_horizon=8,
    dtype="float32",
    attention="plain",
    remat="full",
)
"""The toy base's sizes: a cell of its table per vision patch, its own tokenizer, its real number of action dimensions."""


def _libero(name: str, steps: int, warmup_steps: int) -> Preset:
    schedule = ScheduleConfig(peak=5e-5, end=5e-6, warmup_steps=warmup_steps, decay_steps=steps)
    return Preset(name=name, model=FULL, train=TrainConfig(steps=steps, batch_size=4, schedule=schedule))


LIBERO10 = _libero("libero10", steps=10_000, warmup_steps=300)
LIBERO100 = _libero("libero100", steps=30_000, warmup_steps=1_000)
LIBERO100_BASKET = _libero("libero100-basket", steps=30_000, warmup_steps=1_000)
"""The compositional split: as libero100, with the annotations of libero-100-basket-r."""

LIBERO_SMALL = Preset(
    name="libero-small",
    model=SMALL,
    data=DataConfig(max_token_len=192, text_buckets=(64, 96, 128, 192)),
    train=TrainConfig(
        steps=3_600,
        batch_size=32,
        schedule=scratch_schedule(3_600),
        ema_decay=0.995,
        freeze="none",
        flow_draws=4,
        augment=None,
    ),
)
"""A proof that the whole of it learns: ``SMALL`` from random weights on one task's demonstrations (--weights none)."""

TOY = Preset(
    name="toy",
    model=TOY_MODEL,
    data=DataConfig(max_token_len=64, text_buckets=(64,)),
    train=TrainConfig(
        steps=2_000,
        batch_size=32,
        schedule=ScheduleConfig(peak=1e-3, end=5e-5, warmup_steps=100, decay_steps=2_000),
        diffusion_loss_coeff=0.07,
        flow_draws=4,
        augment=None,
        save_every=400,
        keep_checkpoints=5,
    ),
)
"""The real job in small, from the toy base in the package; no augmentation, because the wrist view measures distances.

The base acts well already, while one token of a plan says which block comes first: the weight of the action loss is small for
its sake, and the adapters' scale of 8 lets them learn as fast as they can at a rate that leaves the image tower what it sees
(with scale 1 and a rate of 2e-3 the error of actions was twice as large)."""

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (TOY, LIBERO_SMALL, LIBERO10, LIBERO100, LIBERO100_BASKET)}
"""Every named job."""
