"""The process groups of one rank of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from ds_pipe.executor.failures import FailureBoard, StoreBoard, default_store
from ds_pipe.executor.group_transport import break_connections
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
        self.tensor: dist.ProcessGroup | None = None
        """The ranks that share the layers of this rank's stages, if there is an axis `model`."""
        self.every: dist.ProcessGroup | None = None
        """All ranks: in it they agree at the end of a step."""
        self.ties: dict[tuple[int, ...], dist.ProcessGroup] = {}
        """Pipeline ranks of a tie -> those of this rank's copy of the model."""
        self.tied_data: dict[tuple[int, ...], dist.ProcessGroup] = {}
        """Pipeline ranks of a tie -> all ranks that have the weight: those of all data-parallel copies."""
        self.borrowed: list[dist.ProcessGroup] = []
        """Groups of others that `leave` ends, too, such as those in which layers exchange their parts."""
        self.part = 0
        """Index of this rank among those that share its layers."""
        self.last_rank = 0
        """Global rank of the last stage in `pipe`."""
        self._num_ranks = module.process_topology.world_size()
        self._job_name = ""
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
        self.every = self._made(range(topology.world_size()))
        for line in lines(topology, "data"):
            self.data = self._made(line) or self.data
        if topology.get_dim("model") > 1:
            for line in lines(topology, "pipe", "model"):
                self.model = self._made(line) or self.model
            for line in lines(topology, "model"):
                self.tensor = self._made(line) or self.tensor
                self.part = line.index(self._me) if self._me in line else self.part
        else:
            self.model = self.pipe
        for plane in lines(topology, "pipe", "data") if ties else ():
            for ranks in ties:
                members = [r for r in plane if getattr(topology.get_coord(r), "pipe") in ranks]  # noqa: B009
                if (group := self._made(members)) is not None:
                    self.tied_data[ranks] = group

        # The first rank's group has a name of its own, which the ranks of other copies do not know.
        box = [str(self.messages.group_name) if self.messages is not None else ""]
        dist.broadcast_object_list(box)
        self._job_name = box[0]

    def board(self) -> FailureBoard:
        """Returns where all ranks of the job, those of the other copies of the model too, report failures."""
        return StoreBoard(default_store(), self._job_name, self._num_ranks)

    def _made(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Makes a group on all ranks; None on those that are not in it."""
        group = dist.new_group(list(ranks))
        return group if self._me in ranks else None

    def leave(self) -> None:
        """Ends with an error what other ranks wait for in these groups, after a failure on some rank. They cannot be
        used afterwards. Messages are the transport's, which ends them by itself.
        """
        for group in (*self._every(), *self.borrowed):
            if group is not self.messages:
                others = [rank for rank in dist.get_process_group_ranks(group) if rank != self._me]
                break_connections(group, others)

    def close(self) -> None:
        """Destroys the groups."""
        for group in self._every():
            dist.destroy_process_group(group)
        self.pipe = self.messages = self.data = self.model = self.tensor = self.every = None
        self.ties, self.tied_data = {}, {}

    def _every(self) -> list[dist.ProcessGroup]:
        named = [self.pipe, self.messages, self.data, self.model, self.tensor, self.every]
        every = [*self.ties.values(), *self.tied_data.values(), *named]
        return [group for group in dict.fromkeys(every) if group is not None]
