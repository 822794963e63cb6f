"""`PipelineParallelGrid`: the process groups of a topology, with Megatron's methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ds_pipe.model import PipeDataParallelTopology, PipelineModule, ProcessTopology
from ds_pipe.model.topology import lines

_KINDS = {"pipe": ("pipe",), "data": ("data",), "slice": ("model",), "model": ("pipe", "model")}
"""Kind of a group -> the axes in which its ranks differ. As in DeepSpeed, "model" includes the stages."""


class PipelineParallelGrid:
    """The coordinates and groups of this rank in a topology. Making it is collective."""

    def __init__(self, topology: ProcessTopology | None = None, process_group: Any = None) -> None:
        world = dist.get_world_size(process_group) if dist.is_initialized() else 1
        self._topo = topology if topology is not None else PipeDataParallelTopology(1, world)
        if self._topo.world_size() != world:
            raise ValueError(f"{self._topo} has not the {world} ranks of this job")
        self.global_rank = dist.get_rank() if dist.is_initialized() else 0
        self._ranks: dict[str, list[int]] = {}
        self._groups: dict[str, Any] = {}
        for kind, axes in _KINDS.items():
            for line in lines(self._topo, *axes):
                group = dist.new_group(line) if dist.is_initialized() else None
                if self.global_rank in line:
                    self._ranks[kind], self._groups[kind] = line, group
        self.pipe_parallel_size = self._size("pipe")
        self.data_parallel_size = self._size("data")
        self.model_parallel_size = self.slice_parallel_size = self._size("slice")
        self.stage_id = self.get_stage_id()
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1

    def topology(self) -> ProcessTopology:
        return self._topo

    def _size(self, kind: str) -> int:
        return len(self._ranks[kind])

    def _rank(self, kind: str) -> int:
        return self._ranks[kind].index(self.global_rank)

    def _coordinate(self, axis: str) -> int:
        return int(getattr(self._topo.get_coord(self.global_rank), axis, 0))

    def get_stage_id(self) -> int:
        return self._coordinate("pipe")

    def get_data_parallel_id(self) -> int:
        return self._coordinate("data")

    def stage_to_global(self, stage_id: int, **coordinates: int) -> int:
        """Returns the global rank of another stage with the same other coordinates."""
        here = dict(zip(self._topo.axes, self._topo.get_coord(self.global_rank), strict=True))
        return self._topo.get_rank(**{**here, **coordinates, "pipe": stage_id})

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_pipe_parallel_rank(self) -> int:
        return self.get_stage_id()

    def get_pipe_parallel_world_size(self) -> int:
        return self._size("pipe")

    def get_pipe_parallel_group(self) -> Any:
        return self._groups["pipe"]

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_id()

    def get_data_parallel_world_size(self) -> int:
        return self._size("data")

    def get_data_parallel_group(self) -> Any:
        return self._groups["data"]

    def get_data_parallel_group_ranks(self) -> Sequence[int]:
        return self._ranks["data"]

    def get_model_parallel_rank(self) -> int:
        return self._rank("model")

    def get_model_parallel_world_size(self) -> int:
        return self._size("model")

    def get_model_parallel_group(self) -> Any:
        return self._groups["model"]

    def get_slice_parallel_rank(self) -> int:
        return self._rank("slice")

    def get_slice_parallel_world_size(self) -> int:
        return self._size("slice")

    def get_slice_parallel_group(self) -> Any:
        return self._groups["slice"]

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group


def grid_of(model: Any) -> PipelineParallelGrid | None:
    """Returns the groups of a pipeline model; None for another model."""
    if not isinstance(model, PipelineModule):
        return None
    own = getattr(model, "mpu", None)
    return own() if callable(own) else PipelineParallelGrid(model.process_topology)
