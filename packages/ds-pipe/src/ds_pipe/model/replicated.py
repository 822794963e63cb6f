"""Plain data parallelism of a stage: gradients are averaged once in a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.interfaces import Work


class Replicated:
    """The control of a stage whose parameters are the same on all data-parallel ranks."""

    def __init__(self, params: Iterable[Tensor], group: dist.ProcessGroup) -> None:
        """Broadcasts the values of the group's first rank.

        Args:
            params: the parameters of the stage.
            group: its data-parallel ranks.
        """
        self._params, self._group = list(params), group
        source = dist.get_process_group_ranks(group)[0]
        with torch.no_grad():
            for param in self._params:
                dist.broadcast(param, source, group)

    def unshard(self, async_op: bool = False) -> Work | None:
        """Needs nothing: parameters are always whole."""
        return None

    def reshard(self) -> None:
        """Needs nothing."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Needs nothing: `reduce_gradients` is called once in a step."""

    def reduce_gradients(self) -> None:
        """Averages the gradients, all of one dtype in one message."""
        size = dist.get_world_size(self._group)
        grads = [p.grad for p in self._params if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in grads):
            same = [g for g in grads if g.dtype is dtype]
            flat = torch.cat([g.flatten() for g in same])
            dist.all_reduce(flat, group=self._group)
            flat /= size
            for grad, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                grad.copy_(part.view_as(grad))
