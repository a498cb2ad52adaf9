"""A folder of golden numbers as models, batches and arrays. Every size comes from its ``config.json``."""

import dataclasses
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusevla.arrays import Batch, Observation
from fusevla.losses import Flow
from fusevla.model.fuse import Pi0Fuse, abstract
from fusevla.model.openpi_names import entries, leaves_by_name
from fusevla.presets import ExpertConfig, LoraConfig, ModelConfig, VisionConfig

F32, BF16 = 1e-5, 2e-2
TESTS = Path(__file__).parent


def find_golden() -> Path:
    """``$FUSEVLA_GOLDEN``, else the complete set where a checkout has it beside it, else the committed subset."""
    named, complete = os.environ.get("FUSEVLA_GOLDEN"), TESTS.parents[1] / "shared" / "golden"
    return Path(named) if named else complete if complete.exists() else TESTS / "golden"


def relative_error(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of the reference, in float64. Shapes must be equal."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shape: expected {theirs.shape}, got {ours.shape}"
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - theirs)) / max(float(np.linalg.norm(theirs)), 1e-30)


def tolerance(tag: str) -> float:
    """What the numerics contract allows a file of that name."""
    return BF16 if tag.endswith("bf16") else F32


@dataclasses.dataclass(frozen=True)
class GoldenSet:
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def __hash__(self) -> int:
        return hash(self.folder)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.npz").exists()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    def model_config(self, tag: str) -> ModelConfig:
        """Sizes for a file's tag: ``..lora..`` carries adapters, ``..bf16`` at the end computes in bfloat16.

        The two compatibility options reproduce the reference: its feed-forward LoRA ignores the scale, its image tower's
        softmax runs in the compute dtype.
        """
        c, lora = self.config, "lora" in tag
        s = c["siglip"]
        return ModelConfig(
            vision=VisionConfig(
                s["width"], s["depth"], s["mlp_dim"], s["num_heads"], s["patch"], c["image_size"], float32_softmax=False
            ),
            language=ExpertConfig(**c["paligemma"], lora=_lora(c["lora"].get("pg")) if lora else None),
            action=ExpertConfig(**c["action_expert"], lora=_lora(c["lora"].get("ae")) if lora else None),
            vocab_size=c["vocab"],
            action_dim=c["action_dim"],
            action_horizon=c["action_horizon"],
            dtype="bfloat16" if tag.endswith("bf16") else "float32",
            attention="plain",
            remat="none",
        )

    def stored_params(self, lora: bool) -> dict[str, np.ndarray]:
        return self.arrays("params_base") | (self.arrays("params_lora_extra") if lora else {})

    def model(self, tag: str) -> Pi0Fuse:
        """The golden weights in float32, every stored leaf used."""
        config = self.model_config(tag)
        stored, empty = self.stored_params("lora" in tag), abstract(config)
        table = entries(empty)
        assert set(table) == set(stored)
        by_leaf: dict[str, np.ndarray] = {}
        for path, entry in table.items():
            by_leaf |= zip(entry.leaves, split_joined(stored[path], len(entry.leaves)), strict=True)
        leaves = [jnp.asarray(by_leaf[name]).reshape(leaf.shape) for name, leaf in leaves_by_name(empty).items()]
        return jax.tree.unflatten(jax.tree.structure(empty), leaves)

    def by_path(self, tree: Pi0Fuse) -> dict[str, np.ndarray]:
        """Leaves of a model-shaped tree (gradients, updated weights) by openpi path, in the stored layout."""
        leaves = leaves_by_name(tree)
        found = {}
        for path, entry in entries(abstract(tree.config)).items():
            if all(name in leaves for name in entry.leaves):
                parts = [np.asarray(leaves[name], np.float32) for name in entry.leaves]
                found[path] = parts[0] if len(parts) == 1 else np.concatenate([parts[0][:, None], parts[1]], axis=1)
        return found

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.arrays("inputs")

    @cached_property
    def batch(self) -> Batch:
        z, cameras = self.inputs, self.config["cameras"]
        observation = Observation(
            images={name: jnp.asarray(z[f"image_uint8/{name}"]) for name in cameras},
            image_masks={name: jnp.asarray(z[f"image_mask/{name}"]) for name in cameras},
            state=jnp.asarray(z["state"]),
            tokens=jnp.asarray(z["tokenized_prompt"]),
            token_mask=jnp.asarray(z["tokenized_prompt_mask"]),
            token_ar_mask=jnp.asarray(z["token_ar_mask"]).astype(bool),
        )
        actions = jnp.asarray(z["actions"])
        return Batch(
            observation,
            jnp.asarray(z["token_loss_mask"]),
            jnp.asarray(z["diffusion_loss_mask"]),
            actions,
            jnp.zeros(actions.shape[:2], bool),
        )

    @cached_property
    def flow(self) -> Flow:
        """The fixed noise and times of the training files: one draw per sample."""
        with jax.ensure_compile_time_eval():  # the first to ask may be inside a jit
            return Flow(jnp.asarray(self.inputs["noise"][:, None]), jnp.asarray(self.inputs["time"][:, None]))

    def sample(self, name: str) -> slice:
        """``b4`` is the whole batch, ``s0`` .. the samples alone."""
        return slice(None) if name.startswith("b") else slice(int(name[1:]), int(name[1:]) + 1)


def _lora(config: dict[str, Any] | None) -> LoraConfig | None:
    if config is None:
        return None
    applied = config.get("applied_to", ["attn", "ffn"])
    return LoraConfig(
        config["rank"], config["alpha"], config["rslora"], "attn" in applied, "ffn" in applied, scale_feed_forward=False
    )


def split_joined(stored: np.ndarray, parts: int) -> list[np.ndarray]:
    """One array for its own leaf; a joined qkv [layers, 3, heads, ...] as q and kv."""
    return [stored] if parts == 1 else [stored[:, 0], stored[:, 1:]]
