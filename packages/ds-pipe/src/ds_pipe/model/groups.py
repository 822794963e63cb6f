"""The process groups of one rank of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from ds_pipe.model.pipeline_module import PipelineModule
from ds_pipe.model.topology import lines


class PipelineGroups:
    """The process groups of this rank. All ranks make all groups in the same order; None: no process group exists."""

    def __init__(self, module: PipelineModule) -> None:
        """Makes them for a model. Collective over all ranks of the job."""
        self.pipe: dist.ProcessGroup | None = None
        """The ranks with the other stages of this rank's copy of the model."""
        self.messages: dist.ProcessGroup | None = None
        """The same ranks, for activations and gradients only."""
        self.data: dist.ProcessGroup | None = None
        """The ranks with the same stages."""
        self.model: dist.ProcessGroup | None = None
        """The ranks that together hold one copy of the model: as `pipe`, and the axis `model` if there is one."""
        self.ties: dict[tuple[int, ...], dist.ProcessGroup] = {}
        """Pipeline ranks of a tie -> those of this rank's copy of the model."""
        self.tied_data: dict[tuple[int, ...], dist.ProcessGroup] = {}
        """Pipeline ranks of a tie -> all ranks that have the weight: those of all data-parallel copies."""
        self.last_rank = 0
        """Global rank of the last stage in `pipe`."""
        if not dist.is_initialized():
            return
        topology, ties = module.process_topology, module.tie_groups()
        self._me = module.global_rank
        for line in lines(topology, "pipe"):
            self.pipe = self._made(line) or self.pipe
            self.messages = self._made(line) or self.messages
            if self._me in line:
                self.last_rank = line[module.rank_of_stage[-1]]
            for ranks in ties:
                if (group := self._made([line[rank] for rank in ranks])) is not None:
                    self.ties[ranks] = group
        for line in lines(topology, "data"):
            self.data = self._made(line) or self.data
        if topology.get_dim("model") > 1:
            for line in lines(topology, "pipe", "model"):
                self.model = self._made(line) or self.model
        else:
            self.model = self.pipe
        for plane in lines(topology, "pipe", "data") if ties else ():
            for ranks in ties:
                members = [r for r in plane if getattr(topology.get_coord(r), "pipe") in ranks]  # noqa: B009
                if (group := self._made(members)) is not None:
                    self.tied_data[ranks] = group

    def _made(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Makes a group on all ranks; None on those that are not in it."""
        group = dist.new_group(list(ranks))
        return group if self._me in ranks else None

    def close(self) -> None:
        """Destroys the groups."""
        every = {
            *self.ties.values(),
            *self.tied_data.values(),
            self.pipe,
            self.messages,
            self.data,
            self.model,
        }
        for group in every - {None}:
            dist.destroy_process_group(group)
        self.pipe = self.messages = self.data = self.model = None
        self.ties, self.tied_data = {}, {}
