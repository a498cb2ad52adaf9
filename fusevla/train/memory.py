"""What a training step needs of a device's memory, from shapes alone, and what to say where that is more than there is.

The figures are the compiler's, for the backend at hand: work space is planned differently for a CPU and for a GPU, and may
differ. Arguments (weights, optimizer, batch) are the same everywhere.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from fusevla.arrays import Batch, Observation
from fusevla.model.fuse import Pi0Fuse
from fusevla.presets import Preset
from fusevla.train.job import abstract_state, abstract_stored
from fusevla.train.levers import divisors, levers, plan_flags
from fusevla.train.sharding import check_batch_size
from fusevla.train.state import TrainState
from fusevla.train.step import train_step

GB = 1e9
SHARE, RESERVE = 0.95, int(0.6 * GB)
"""Of a GPU's memory, what can be counted on: the rest is for the CUDA context, kernels' libraries and fragmentation."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs."""

    argument_bytes: int
    """Weights, optimizer, averages and the batch."""
    temp_bytes: int
    """Work space: activations, gradients."""
    output_bytes: int = 0
    """Results that do not take the place of a donated argument."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes


def usable_bytes(gpu: float) -> int:
    """What can be counted on of a GPU of ``gpu`` GB (10^9 bytes). ``ValueError`` where that is nothing."""
    usable = SHARE * gpu * GB - RESERVE
    if not 0 < usable < float("inf"):
        raise ValueError(f"--gpu: expected the memory of a GPU in GB, more than {RESERVE / SHARE / GB:.2f}; got {gpu:g}")
    return round(usable)


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """What the compiler planned; None where the backend does not tell."""
    stats = cast(Any, compiled.memory_analysis())
    if stats is None:
        return None
    fresh = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, fresh)


def largest_of(executables: Iterable[jax.stages.Compiled]) -> Memory | None:
    """What the one needs that needs most; None where the backend does not tell."""
    known = [memory for memory in map(memory_of, executables) if memory is not None]
    return max(known, key=lambda memory: memory.total, default=None)


def _empty_batch(preset: Preset, size: int, length: int) -> Batch:
    """Zeros in the shapes of a batch with every camera of the preset."""
    model, flags, text = preset.model, jnp.zeros(size, bool), jnp.zeros((size, length), bool)
    side, cameras = model.vision.image_size, sorted(preset.data.cameras)
    observation = Observation(
        images={camera: jnp.zeros((size, side, side, 3), jnp.uint8) for camera in cameras},
        image_masks=dict.fromkeys(cameras, flags),
        state=jnp.zeros((size, model.action_dim), jnp.float32),
        tokens=jnp.zeros((size, length), jnp.int32),
        token_mask=text,
        token_ar_mask=text,
    )
    return Batch(
        observation=observation,
        token_loss_mask=text,
        diffusion_loss_mask=flags,
        actions=jnp.zeros((size, model.action_horizon, model.action_dim), jnp.float32),
        action_is_pad=jnp.zeros((size, model.action_horizon), bool),
    )


def abstract_inputs(preset: Preset, batch_size: int, text_length: int) -> tuple[TrainState, Pi0Fuse, Batch]:
    """(state, frozen, batch) of ``train_step`` as shapes: no weight is made or read.

    Attention that is yet to be chosen is taken as "xla", which runs everywhere and needs no less memory than cuDNN's.
    """
    if preset.model.attention == "auto":
        preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, attention="xla"))
    batch = jax.eval_shape(partial(_empty_batch, preset, batch_size, text_length))
    return abstract_state(preset), abstract_stored(preset), batch


def least_memory(preset: Preset, batch_size: int, text_length: int, devices: int = 1) -> Memory:
    """The arguments alone, without compiling: what the step needs at the very least. Parameters as of ``planned_memory``."""
    check_batch_size(batch_size, devices)
    leaves = jax.tree.leaves(abstract_inputs(preset, batch_size // devices, text_length))
    return Memory(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), 0)


def planned_memory(preset: Preset, batch_size: int, text_length: int, devices: int = 1) -> Memory:
    """Compiles ``train_step`` for shapes and reads what it needs on each of ``devices`` (a minute or more at full size).

    ``batch_size`` samples over all devices (whatever the preset says), text padded to ``text_length``. One device's share is
    compiled: with several, gradients are summed in place. Raises ``ValueError`` where the batch cannot be shared, or where the
    backend does not tell.
    """
    check_batch_size(batch_size, devices)
    step = partial(train_step, config=preset.train, mask_padded_actions=preset.data.mask_padded_actions)
    inputs = abstract_inputs(preset, batch_size // devices, text_length)
    # Buffers are assigned before LLVM sees the program: without its passes the plan is the same to some hundred bytes.
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    compiled = jax.jit(step, donate_argnums=0).lower(*inputs).compile(compiler_options=cast(Any, options))
    memory = memory_of(compiled)
    if memory is None:
        raise ValueError(f"backend {jax.default_backend()}: it does not say what a step needs; plan with JAX_PLATFORMS=cpu")
    return memory


def warning(memory: Memory, limit_bytes: int | None, preset: Preset) -> str | None:
    """What to say before a step that needs more than there is; None where it fits, or where the limit is not known."""
    if limit_bytes is None or memory.total <= limit_bytes:
        return None
    train, work, room = preset.train, memory.total - memory.argument_bytes, limit_bytes - memory.argument_bytes
    parts = divisors(train.batch_size, train.accumulate)
    enough = [number for number in parts if work * train.accumulate <= room * number] or parts[-1:]
    flags = [lever.flag for lever in levers(preset, enough[:1])] + ["--batch with fewer samples"]
    gpu, to_work = (limit_bytes + RESERVE) / SHARE / GB, f"{work / GB:.1f} GB to work in" if work else "without any to work in"
    return (
        f"warning: a training step needs at least {memory.total / GB:.1f} GB of memory ({memory.argument_bytes / GB:.1f} GB for "
        f"weights, optimizer and batch, {to_work}) and there are {limit_bytes / GB:.1f} GB: it is likely to "
        f"run out.\nFlags that save memory, from harmless to costly: {', '.join(flags)}.\n"
        f"Which of them are enough: python experiments/plan_memory.py {' '.join(plan_flags(preset))} --gpu {gpu:.1f}"
    )
