"""Device meshes with named axes over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ds_comm.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def data_mesh(world: World, axes: Mapping[str, int] | None = None) -> DeviceMesh:
    """Returns a device mesh over all ranks of `world`. `axes` maps names to sizes, outermost first; default {"data":
    all ranks}.

    Ranks along the last axis have consecutive numbers and usually share a machine, so put the axis with the most
    traffic last. A mesh of one axis uses the default process group. More axes create process groups, so all ranks
    must call this with the same arguments.

    Raises:
        ValueError: the product of the sizes is not the number of ranks.
    """
    axes = {"data": world.world_size} if axes is None else dict(axes)
    product = math.prod(axes.values())
    if not axes or min(axes.values()) < 1 or product != world.world_size:
        equation = " x ".join(f"{name} {size}" for name, size in axes.items()) or "no axes"
        raise ValueError(
            f"{equation} = {product} does not cover {world.world_size} ranks: the sizes must be positive, and "
            "their product must be the number of ranks"
        )
    from torch.distributed.device_mesh import init_device_mesh  # imports half of torch.distributed

    return init_device_mesh(world.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
