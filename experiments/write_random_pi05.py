"""Write random numbers in the layout of the published pi0.5 weights, to try loading without a network.

    python experiments/write_random_pi05.py --out /tmp/random_pi05                  # 13.4 GB, float32, as published
    python experiments/write_random_pi05.py --out /tmp/tiny --model tiny --lora     # a small one

One leaf at a time is in memory. The result is ``OUT/params``, which ``experiments/load_pi05.py --weights OUT`` reads.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """What to write, and where."""

    out: Path
    """Gets a folder ``params``; must not have one."""
    model: Literal["full", "tiny"] = "full"
    """``full`` has the published sizes."""
    lora: bool = False
    """With LoRA leaves."""
    trailing_value: bool = False
    """End every path in ``value``, as checkpoints of openpi's training runs do."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RandomLeaf:
    """An array that exists only while it is being written."""

    shape: tuple[int, ...]
    dtype: Any
    seed: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    def draw(self):
        """Normal(0.02) numbers: small enough for a forward pass of many layers to stay finite."""
        import numpy as np

        numbers = np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)
        numbers *= np.float32(0.02)
        return numbers.astype(self.dtype, copy=False)


def write(args: Args) -> Path:
    """Writes the checkpoint; returns its ``params`` folder."""
    import jax
    import orbax.checkpoint as ocp
    from jax.numpy import dtype

    from fusevla.model.fuse import abstract
    from fusevla.model.openpi_names import entries
    from fusevla.presets import PI05, TINY, without_lora

    config = PI05 if args.model == "full" else TINY
    tree: dict[str, Any] = {}
    wanted = entries(abstract(config if args.lora else without_lora(config)))
    for index, entry in enumerate(wanted.values()):
        *parents, last = f"params/{entry.path}{'/value' if args.trailing_value else ''}".split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = RandomLeaf(entry.shape, dtype(args.dtype), (args.seed, index))
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (RandomLeaf, _leaf_writer())
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save((args.out / "params").absolute(), tree)
    return args.out / "params"


def _leaf_writer():
    import orbax.checkpoint as ocp

    class LeafWriter(ocp.type_handlers.NumpyHandler):
        """Draws and writes one leaf after the other; on disk they are ordinary NumPy leaves."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)

        async def _background_serialize(self, values: Sequence[RandomLeaf], infos, args=None) -> None:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                await super()._background_serialize([value.draw()], [info], [arg])

    return LeafWriter()


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    folder = args.out / "params"
    if folder.exists():
        sys.exit(f"{folder} exists: choose another --out, or remove it")
    written = write(args)
    size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    print(f"{written}: {size / 1e9:.2f} GB; read it with: python experiments/load_pi05.py --weights {args.out}")


if __name__ == "__main__":
    main()
