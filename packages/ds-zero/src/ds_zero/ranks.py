"""The ranks among which a model is sharded, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """A data-parallel group seen from one rank; `group` is None for a single rank, which never
    communicates.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks_of(mesh: DeviceMesh | None) -> Ranks:
    """The ranks of a one-dimensional mesh; without a mesh all ranks of the default process group, or this
    process alone.
    """
    if mesh is None:
        if not dist.is_initialized():
            return Ranks(None, 0, 1)
        group = dist.group.WORLD
    else:
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            raise ValueError(
                f"mesh has {mesh.ndim} axes {names or ''}: pass the data axis alone, for example "
                f"mesh[{(names or ('data',))[0]!r}]"
            )
        group = mesh.get_group()
    assert group is not None
    size = dist.get_world_size(group)
    return Ranks(group if size > 1 else None, dist.get_rank(group), size)
