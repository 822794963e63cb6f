"""Device meshes: named axes over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ds_comm.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def data_mesh(world: World, axes: Mapping[str, int] | None = None) -> DeviceMesh:
    """A mesh over all ranks of `world` with the given axes, outermost first; by default one axis, "data".

    Ranks that differ only in the last axis have consecutive numbers, so put the axis with the most traffic last. A mesh
    of one axis uses the default process group. More axes create process groups, so all ranks must call this with the
    same arguments.

    Raises:
        ValueError: the sizes of the axes do not multiply to the number of ranks.
    """
    axes = {"data": world.world_size} if axes is None else dict(axes)
    product = math.prod(axes.values())
    if not axes or min(axes.values()) < 1 or product != world.world_size:
        equation = " x ".join(f"{name} {size}" for name, size in axes.items()) or "no axes"
        raise ValueError(
            f"{equation} = {product} does not cover {world.world_size} ranks: the sizes of the axes are "
            f"positive and multiply to the number of ranks"
        )
    from torch.distributed.device_mesh import init_device_mesh  # imports half of torch.distributed

    return init_device_mesh(world.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
