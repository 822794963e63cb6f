"""DeepSpeed's family of topologies: ranks on named axes, the last of which varies fastest."""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Sequence

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class ProcessTopology:
    """A grid of ranks. Ranks that differ only in the last axis have consecutive numbers."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        """Takes the names of the axes, outermost first, and their sizes.

        Raises:
            ValueError: names and sizes do not fit each other.
        """
        if len(axes) != len(dims) or len(set(axes)) != len(axes) or any(size < 1 for size in dims):
            raise ValueError(
                f"axes {list(axes)} with sizes {list(dims)}: each needs a name and a size of at least 1"
            )
        self.axes, self.dims = tuple(axes), tuple(dims)
        self.ProcessCoord: Callable[..., tuple[int, ...]] = namedtuple("ProcessCoord", axes)  # type: ignore[misc]

    def get_rank(self, **coordinates: int) -> int:
        """Returns the rank with these coordinates, one for each axis."""
        if set(coordinates) != set(self.axes):
            raise ValueError(f"coordinates are needed for the axes {', '.join(self.axes)}; got {coordinates}")
        rank = 0
        for axis, size in zip(self.axes, self.dims, strict=True):
            if not 0 <= coordinates[axis] < size:
                raise ValueError(f"{axis}={coordinates[axis]}: this axis has coordinates 0 to {size - 1}")
            rank = rank * size + coordinates[axis]
        return rank

    def get_coord(self, rank: int) -> tuple[int, ...]:
        """Returns the coordinates of a rank, as a named tuple."""
        if not 0 <= rank < self.world_size():
            raise ValueError(f"rank {rank} is not one of {self.world_size()} ranks")
        values = []
        for size in reversed(self.dims):
            rank, value = divmod(rank, size)
            values.append(value)
        return self.ProcessCoord(*values[::-1])

    def get_axis_names(self) -> list[str]:
        """Returns the names of the axes."""
        return list(self.axes)

    def get_dim(self, axis: str) -> int:
        """Returns the size of an axis; 0 if there is none of this name."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def world_size(self) -> int:
        """Returns the number of ranks."""
        return math.prod(self.dims)

    def filter_match(self, **coordinates: int) -> list[int]:
        """Returns the ranks with these coordinates, which may leave out axes."""
        return [
            rank
            for rank in range(self.world_size())
            if all(getattr(self.get_coord(rank), axis) == value for axis, value in coordinates.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Returns the ranks whose coordinate on an axis is `idx`."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Returns groups of ranks that differ in one axis only."""
        if axis not in self.axes:
            return []
        others = [a for a in self.axes if a != axis]
        return [
            self.filter_match(**dict(zip(others, values, strict=True)))
            for values in itertools.product(*(range(self.get_dim(a)) for a in others))
        ]

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """Returns the coordinates of a rank as text, as `model_00`."""
        coordinates = self.get_coord(rank)
        return outer_sep.join(
            f"{axis}{inner_sep}{getattr(coordinates, axis):02d}"
            for axis in self.axes
            if axis not in omit_axes
        )

    def mesh(self, device_type: str = "cpu") -> DeviceMesh:
        """Returns the mesh of these axes over all ranks. Collective. The axis `model` becomes `tensor`."""
        names = tuple("tensor" if axis == "model" else axis for axis in self.axes)
        return init_device_mesh(device_type, self.dims, mesh_dim_names=names)

    def __repr__(self) -> str:
        """Shows axes and sizes."""
        return f"{type(self).__name__}({', '.join(f'{a}={n}' for a, n in zip(self.axes, self.dims, strict=True))})"


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages outermost, data-parallel ranks next to each other."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        """Takes the numbers of pipeline ranks and of data-parallel ranks."""
        super().__init__(("pipe", "data"), (num_pp, num_dp))


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline stages, then data-parallel ranks, then model-parallel ranks next to each other."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        """Takes the numbers of pipeline, model-parallel and data-parallel ranks."""
        super().__init__(("pipe", "data", "model"), (num_pp, num_dp, num_mp))


def lines(topology: ProcessTopology, *axes: str) -> list[list[int]]:
    """Returns groups of ranks that differ in these axes only, in the order of ranks. Axes that do not exist are left
    out, so that without any of them every rank is alone.
    """
    others = [axis for axis in topology.axes if axis not in axes]
    return [
        topology.filter_match(**dict(zip(others, values, strict=True)))
        for values in itertools.product(*(range(topology.get_dim(axis)) for axis in others))
    ]
