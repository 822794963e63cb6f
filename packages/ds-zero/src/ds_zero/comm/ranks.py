"""The ranks of a sharded axis, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ds_zero.interfaces import Abort, Connect, Transport


class SimulatedGroup(dist.ProcessGroup):
    """A process group without other processes, with which `plan` runs this package. It makes its own subgroups,
    because there is no other process with which to create one.
    """

    def part(self, size: int) -> SimulatedGroup:
        """Returns the simulated group of `size` ranks that contains this rank."""
        raise NotImplementedError


AXES = ("data", "replicate", "expert", "secondary")
"""Kinds of rank groups: "data": the ranks over which buckets are sharded. "replicate": ranks that hold the same slices
in different rows of a mesh. "expert": the ranks over which parameters with a mesh from `mesh_for` are sharded.
"secondary": ranks that share a secondary copy."""


@dataclass(frozen=True)
class Ranks:
    """The ranks among which buckets are sharded, and this rank's index; `group` is None for a single rank, which
    never communicates.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    replicas: Ranks | None = None
    """The ranks of other groups that hold the same slices as this rank; None: no other rank does."""
    mean_over: int = 0
    """Number of ranks over which gradients are averaged; 0: all of these ranks, including replicas."""
    part: tuple[int, int] = (0, 1)
    """Index of this set of ranks among the sets that hold different values under the same names, and the number of
    sets.
    """
    across: Ranks | None = None
    """The ranks that hold the other runs of parameters of which these ranks hold one ([Note: stacked parameters])."""
    axis: str = "data"
    """The kind of these ranks, one of `AXES`; a `Comm` may have different collectives for some kinds."""
    transport: Transport | None = field(default=None, compare=False, repr=False)
    """Exchanges tensors with ranks on the same machine without messages; None before `with_transport`, and if there
    is no such rank."""

    @property
    def first(self) -> bool:
        """Whether this is the first rank, also among replicas."""
        return self.rank == 0 and (self.replicas is None or self.replicas.rank == 0)

    @property
    def total(self) -> int:
        """Number of ranks in all replicas together."""
        return self.size * (self.replicas.size if self.replicas is not None else 1)

    @property
    def divisor(self) -> int:
        """Divisor of a sum of gradients that gives their mean."""
        return self.mean_over or self.total

    @property
    def axes(self) -> tuple[Ranks, ...]:
        """The groups over which a collective must run, one after the other, to include all replicas."""
        return (self,) if self.replicas is None else (self, self.replicas)


def with_transport(ranks: Ranks, device: torch.device, connect: Connect, abort: Abort) -> Ranks:
    """Returns the same ranks, with the transport that `connect` finds. Collective."""
    replicas = with_transport(ranks.replicas, device, connect, abort) if ranks.replicas is not None else None
    if ranks.group is None:
        return replace(ranks, replicas=replicas)
    return replace(ranks, replicas=replicas, transport=connect(ranks.group, device, abort))


ALONE = Ranks(None, 0, 1)

_NOT_DATA = frozenset(
    "tensor tp model mp pipe pipeline pp expert ep sequence seq sp context cp".split()  # noqa: SIM905
)
"""Names of model-parallel mesh axes: their ranks hold different parameters, or process the same data."""


def _of_group(group: dist.ProcessGroup | None, replicas: Ranks | None = None) -> Ranks:
    assert group is not None
    size = group.size()
    return Ranks(group if size > 1 else None, group.rank(), size, replicas)


Group = DeviceMesh | dist.ProcessGroup
"""A mesh or a process group of torch."""


def ranks_of(mesh: Group | Ranks | None) -> Ranks:
    """Returns the ranks of a mesh or group; without one, all ranks of the default process group, or this process
    alone.

    A mesh of one axis shards over it. With two axes the first replicates and the second shards, as in FSDP2: buckets
    are sharded within a row, and rows are replicas. A `Ranks` object, as in a plan, is returned unchanged.

    Raises:
        ValueError: the mesh has more axes, or an axis whose ranks do not process different data; pass the data axes
            of the mesh.
    """
    if mesh is None:
        return _of_group(dist.group.WORLD) if dist.is_initialized() else ALONE
    if isinstance(mesh, Ranks):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        return _of_group(mesh)
    if mesh.get_coordinate() is None:
        raise ValueError(
            "this process is not in the mesh: every rank must pass the slice of the mesh that contains it"
        )
    if mesh.ndim == 1:
        return _of_group(mesh.get_group())
    names = mesh.mesh_dim_names
    others = [n for n in names or () if n.lower() in _NOT_DATA]
    if mesh.ndim == 2 and not others:
        across = replace(_of_group(mesh.get_group(0)), axis="replicate")
        return _of_group(mesh.get_group(1), across if across.size > 1 else None)
    data = next((n for n in names or ("data",) if n not in others), "data")
    raise ValueError(
        f"mesh has {mesh.ndim} axes {names or ''}: pass the data axis alone, for example mesh[{data!r}], or two "
        "axes (replicate, shard)"
    )
