"""One device or several: parameters replicated, batches split along their first axis, one jit for both."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusevla.train.request import RequestError

T = TypeVar("T")
BATCH_AXIS = "batch"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-axis mesh over ``devices`` (all of them by default); the compiler places the collectives (Auto axes)."""
    chosen = list(jax.devices() if devices is None else devices)
    return jax.make_mesh((len(chosen),), (BATCH_AXIS,), (AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def check_batch_size(batch_size: int, devices: int, parts: int = 1) -> None:
    """Raises ``RequestError`` unless every device gets the same number of samples of each of the batch's ``parts``."""
    if batch_size % devices:
        raise RequestError(
            f"batch: {batch_size} samples cannot be shared evenly by {devices} devices; "
            f"take a multiple of {devices}, or fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    if batch_size // devices % parts:
        raise RequestError(
            f"accumulate: the {batch_size // devices} samples of each of {devices} devices cannot be divided into {parts} equal "
            f"parts; take a batch that is a multiple of {devices * parts}, or another --accumulate"
        )


def replicate(tree: T, mesh: Mesh) -> T:
    """Every array of ``tree`` copied to all devices of the mesh."""
    return cast(T, jax.device_put(tree, replicated(mesh)))


def put_batch(batch: T, mesh: Mesh) -> T:
    """A host batch (this process' share of it) as device arrays, split along the first axis; returns without waiting."""
    sharding = split(mesh)
    if jax.process_count() == 1:
        return cast(T, jax.device_put(batch, sharding))
    return cast(T, jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch))
