"""openpi's name for every leaf of ``Pi0Fuse``: the explicit table, and what a checkpoint of given sizes must hold.

openpi writes the language expert's leaves without a suffix and the action expert's with ``_1``. Layers are stacked on axis 0
in both. The two trees differ in one place only: where an expert has as many key/value heads as query heads, openpi keeps one
``qkv_einsum`` [layers, 3, heads, width, head_dim], here q and kv.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import ExpertConfig, LoraConfig, ModelConfig, VisionConfig

_IMG = "PaliGemma/img"
_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_LAYERS = "PaliGemma/llm/layers"

OTHERS = {
    f"{_IMG}/embedding/kernel": "vision.patch.kernel",
    f"{_IMG}/embedding/bias": "vision.patch.bias",
    f"{_IMG}/pos_embedding": "vision.position",
    f"{_BLOCK}/LayerNorm_0/scale": "vision.layers.norm1.scale",
    f"{_BLOCK}/LayerNorm_0/bias": "vision.layers.norm1.bias",
    f"{_ATTENTION}/query/kernel": "vision.layers.attn.query.kernel",
    f"{_ATTENTION}/query/bias": "vision.layers.attn.query.bias",
    f"{_ATTENTION}/key/kernel": "vision.layers.attn.key.kernel",
    f"{_ATTENTION}/key/bias": "vision.layers.attn.key.bias",
    f"{_ATTENTION}/value/kernel": "vision.layers.attn.value.kernel",
    f"{_ATTENTION}/value/bias": "vision.layers.attn.value.bias",
    f"{_ATTENTION}/out/kernel": "vision.layers.attn.out.kernel",
    f"{_ATTENTION}/out/bias": "vision.layers.attn.out.bias",
    f"{_BLOCK}/LayerNorm_1/scale": "vision.layers.norm2.scale",
    f"{_BLOCK}/LayerNorm_1/bias": "vision.layers.norm2.bias",
    f"{_BLOCK}/MlpBlock_0/Dense_0/kernel": "vision.layers.mlp.up.kernel",
    f"{_BLOCK}/MlpBlock_0/Dense_0/bias": "vision.layers.mlp.up.bias",
    f"{_BLOCK}/MlpBlock_0/Dense_1/kernel": "vision.layers.mlp.down.kernel",
    f"{_BLOCK}/MlpBlock_0/Dense_1/bias": "vision.layers.mlp.down.bias",
    f"{_IMG}/Transformer/encoder_norm/scale": "vision.norm.scale",
    f"{_IMG}/Transformer/encoder_norm/bias": "vision.norm.bias",
    f"{_IMG}/head/kernel": "vision.head.kernel",
    f"{_IMG}/head/bias": "vision.head.bias",
    "PaliGemma/llm/embedder/input_embedding": "embedder.table",
    "action_in_proj/kernel": "action_in_proj.kernel",
    "action_in_proj/bias": "action_in_proj.bias",
    "time_mlp_in/kernel": "time_mlp_in.kernel",
    "time_mlp_in/bias": "time_mlp_in.bias",
    "time_mlp_out/kernel": "time_mlp_out.kernel",
    "time_mlp_out/bias": "time_mlp_out.bias",
    "action_out_proj/kernel": "action_out_proj.kernel",
    "action_out_proj/bias": "action_out_proj.bias",
}
"""Image tower, embedding table and action heads."""

LANGUAGE_NORMS = {
    f"{_LAYERS}/pre_attention_norm/scale": "language.layers.pre_attention_norm.scale",
    f"{_LAYERS}/pre_ffw_norm/scale": "language.layers.pre_ffw_norm.scale",
    "PaliGemma/llm/final_norm/scale": "language.final_norm.scale",
}
ACTION_NORMS = {
    f"{_LAYERS}/pre_attention_norm_1/Dense_0/kernel": "action.layers.pre_attention_norm.modulation.kernel",
    f"{_LAYERS}/pre_attention_norm_1/Dense_0/bias": "action.layers.pre_attention_norm.modulation.bias",
    f"{_LAYERS}/pre_ffw_norm_1/Dense_0/kernel": "action.layers.pre_ffw_norm.modulation.kernel",
    f"{_LAYERS}/pre_ffw_norm_1/Dense_0/bias": "action.layers.pre_ffw_norm.modulation.bias",
    "PaliGemma/llm/final_norm_1/Dense_0/kernel": "action.final_norm.modulation.kernel",
    "PaliGemma/llm/final_norm_1/Dense_0/bias": "action.final_norm.modulation.bias",
}
MATRICES = {
    "attn/q_einsum{}/w": "q.weight",
    "attn/q_einsum{}/lora_a": "q.adapter.a",
    "attn/q_einsum{}/lora_b": "q.adapter.b",
    "attn/kv_einsum{}/w": "kv.weight",
    "attn/kv_einsum{}/lora_a": "kv.adapter.a",
    "attn/kv_einsum{}/lora_b": "kv.adapter.b",
    "attn/attn_vec_einsum{}/w": "out.weight",
    "attn/attn_vec_einsum{}/lora_a": "out.adapter.a",
    "attn/attn_vec_einsum{}/lora_b": "out.adapter.b",
    "mlp{}/gating_einsum": "gating.weight",
    "mlp{}/gating_einsum_lora_a": "gating.adapter.a",
    "mlp{}/gating_einsum_lora_b": "gating.adapter.b",
    "mlp{}/linear": "linear.weight",
    "mlp{}/linear_lora_a": "linear.adapter.a",
    "mlp{}/linear_lora_b": "linear.adapter.b",
}
"""One expert's matrices; ``{}`` is its suffix."""

JOINED = {
    "attn/qkv_einsum{}/w": ("q.weight", "kv.weight"),
    "attn/qkv_einsum{}/lora_a": ("q.adapter.a", "kv.adapter.a"),
    "attn/qkv_einsum{}/lora_b": ("q.adapter.b", "kv.adapter.b"),
}
"""What stands in place of ``q_einsum`` and ``kv_einsum`` where the numbers of heads are equal."""

SUFFIXES = {"language": "", "action": "_1"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf of the checkpoint: its path, shape, and the leaf of the model that it fills (two for a joined qkv)."""

    path: str
    leaves: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def expert(self) -> str | None:
        """The expert whose adapter this belongs to, None for everything that is not LoRA."""
        name = self.leaves[0].split(".")
        return name[0] if "adapter" in name else None

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


def name_table(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Checkpoint path -> model leaves, as dotted names, for every leaf that a model of this kind may have."""
    table: dict[str, tuple[str, ...]] = {path: (leaf,) for path, leaf in (OTHERS | LANGUAGE_NORMS | ACTION_NORMS).items()}
    for expert, suffix in SUFFIXES.items():
        sizes = getattr(config, expert)
        rows: dict[str, tuple[str, ...]] = {path: (leaf,) for path, leaf in MATRICES.items()}
        if sizes.num_kv_heads == sizes.num_heads:
            rows = {path: leaves for path, leaves in rows.items() if leaves[0].split(".")[0] not in ("q", "kv")} | JOINED
        for path, leaves in rows.items():
            table[f"{_LAYERS}/{path.format(suffix)}"] = tuple(f"{expert}.layers.{leaf}" for leaf in leaves)
    return table


def leaves_by_name(model: Any) -> dict[str, Any]:
    """A module's leaves by dotted name, such as ``language.layers.q.weight``, in the order of the tree."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return {".".join(key.name for key in path): leaf for path, leaf in with_paths}


def entries(model: Pi0Fuse) -> dict[str, Entry]:
    """What a checkpoint of ``model`` (abstract or not) holds, by path; the adapters only where the model has them.

    Raises ``RuntimeError`` for a leaf of the model without a name: the table must grow with the model.
    """
    leaves = leaves_by_name(model)
    table = {path: names for path, names in name_table(model.config).items() if names[0] in leaves}
    nameless = set(leaves) - {name for names in table.values() for name in names}
    if nameless:
        raise RuntimeError(f"fusevla/model/openpi_names.py has no openpi name for: {', '.join(sorted(nameless))}")
    return {path: Entry(path, names, _stored_shape([leaves[name].shape for name in names])) for path, names in table.items()}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The sizes of a checkpoint from the shapes of its leaves, by openpi path; alpha, which no shape tells, is the rank.

    Raises ``KeyError`` with the path of a leaf that it needs and does not find.
    """
    patch, patches = shapes[f"{_IMG}/embedding/kernel"][0], shapes[f"{_IMG}/pos_embedding"][1]
    depth, _, heads, _ = shapes[f"{_ATTENTION}/query/kernel"]
    width, mlp = shapes[f"{_BLOCK}/MlpBlock_0/Dense_0/kernel"][1:]
    vocab_size = shapes["PaliGemma/llm/embedder/input_embedding"][0]
    return ModelConfig(
        vision=VisionConfig(width, depth, mlp, heads, patch_size=patch, image_size=patch * math.isqrt(patches)),
        language=_infer_expert(shapes, ""),
        action=_infer_expert(shapes, "_1"),
        vocab_size=vocab_size,
        action_dim=shapes["action_in_proj/kernel"][0],
    )


def _infer_expert(shapes: Mapping[str, tuple[int, ...]], suffix: str) -> ExpertConfig:
    depth, heads, head_dim, width = shapes[f"{_LAYERS}/attn/attn_vec_einsum{suffix}/w"]
    kv = shapes.get(f"{_LAYERS}/attn/kv_einsum{suffix}/w")
    attention = shapes.get(f"{_LAYERS}/attn/attn_vec_einsum{suffix}/lora_a")
    feed_forward = shapes.get(f"{_LAYERS}/mlp{suffix}/linear_lora_a")
    rank = (attention or feed_forward or (0,))[-1]
    lora = LoraConfig(rank, float(rank), attention=bool(attention), feed_forward=bool(feed_forward)) if rank else None
    mlp = shapes[f"{_LAYERS}/mlp{suffix}/linear"][1]
    return ExpertConfig(width, depth, mlp, heads, kv[2] if kv else heads, head_dim, lora)


def _stored_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """A leaf's own shape; q [layers, heads, ...] and kv [layers, 2, heads, ...] joined are [layers, 3, heads, ...]."""
    return shapes[0] if len(shapes) == 1 else (shapes[0][0], 3, *shapes[0][1:])
