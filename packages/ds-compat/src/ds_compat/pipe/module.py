"""`PipelineModule` with DeepSpeed's methods."""

from __future__ import annotations

from typing import Any

from ds_compat.pipe.grid import PipelineParallelGrid
from ds_pipe.model import LayerSpec, ProcessTopology, TiedLayerSpec
from ds_pipe.model import PipelineModule as Module

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]


class PipelineModule(Module):
    """A model as a list of layers, divided into stages; `ds_pipe.model.PipelineModule` describes the arguments."""

    def __init__(self, layers: Any, num_stages: int | None = None, *args: Any, **kwargs: Any) -> None:
        if num_stages is None and kwargs.get("topology", args[0] if args else None) is None:
            raise RuntimeError("must provide num_stages or topology")
        super().__init__(list(layers), num_stages, *args, **kwargs)
        self._grid = PipelineParallelGrid(self.process_topology)

    def topology(self) -> ProcessTopology:
        """Returns the topology of all ranks."""
        return self.process_topology

    def mpu(self) -> PipelineParallelGrid:
        """Returns the process groups of this rank."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        return self.num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """Returns the pipeline rank that has a layer."""
        stage = next(i for i in range(len(self.rank_of_stage)) if layer_idx < self.parts[i + 1])
        return self.rank_of_stage[stage]
