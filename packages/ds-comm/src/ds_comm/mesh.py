"""Device meshes: named axes over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ds_comm.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def data_mesh(world: World, axes: Mapping[str, int] | None = None) -> DeviceMesh:
    """A mesh over all ranks of `world` with these axes, outermost first; None is one axis "data" over all
    ranks.

    Ranks that differ only in the last axis are neighbours, so put the axis with most traffic last. A one-axis
    mesh uses the default process group; further axes make groups of their own, so every rank has to call this
    alike. Raises ValueError if the sizes do not multiply to the number of ranks.
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
