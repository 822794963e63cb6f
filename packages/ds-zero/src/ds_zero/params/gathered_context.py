"""One `gathered` context while it is open."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.ranks import Ranks
from ds_zero.runtime.bucket import Bucket
from ds_zero.tensors.fingerprint import fingerprint


def exchange_flags(own: Sequence[bool], ranks: Ranks, device: torch.device) -> Tensor:
    """Returns the flags of all ranks: bool, (replicas, ranks, len(own)), on the CPU. Collective."""
    replicas = ranks.replicas
    flags = torch.zeros(replicas.size if replicas is not None else 1, ranks.size, len(own), dtype=torch.int32)
    flags[replicas.rank if replicas is not None else 0, ranks.rank] = torch.tensor(own, dtype=torch.int32)
    flags = flags.to(device)
    for axis in ranks.axes:
        if axis.group is not None:
            dist.all_reduce(flags, group=axis.group)
    return flags.cpu() > 0


class OpenGather:
    """The gathered buckets of one model, with fingerprints of their parameters, by which changes are detected."""

    def __init__(self, buckets: list[Bucket], *, writes: bool) -> None:
        self.buckets = buckets
        self.writes = writes
        """Whether changes are kept at the end."""
        self._before = {id(b): _fingerprints(b) for b in buckets}

    def changed(self) -> dict[int, Tensor]:
        """Returns, for each bucket, which rank has changed which parameter or replaced its `.data`: bool, (replicas,
        ranks, parameters). Collective.
        """
        changed_of: dict[int, Tensor] = {}
        for ranks in {id(b.ranks): b.ranks for b in self.buckets}.values():
            mine = [b for b in self.buckets if b.ranks is ranks]
            own = [x != y for b in mine for x, y in zip(self._before[id(b)], _fingerprints(b), strict=True)]
            flags = exchange_flags(own, ranks, mine[0].device)
            for bucket in mine:
                n = len(bucket.params)
                changed_of[id(bucket)], flags = flags[..., :n], flags[..., n:]
        return changed_of

    def refresh(self, buckets: list[Bucket]) -> None:
        """Takes new fingerprints of `buckets`, after their changes were kept."""
        for bucket in buckets:
            if id(bucket) in self._before:
                self._before[id(bucket)] = _fingerprints(bucket)

    def put_back(self, buckets: list[Bucket]) -> None:
        """Copies the values of parameters whose `.data` was replaced into their bucket, and makes the parameters views
        of it again.
        """
        for bucket in buckets:
            for param, view, slot in zip(bucket.params, bucket.views, bucket.layout.slots, strict=True):
                if _place(param) == _place(view):
                    continue
                if tuple(param.shape) != slot.shape:
                    raise ValueError(
                        f"parameter {slot.fqn!r} of shape {slot.shape} was given data of shape {tuple(param.shape)}: "
                        "to change its shape, call ds_zero.destroy(model), change it, and shard again"
                    )
                view.copy_(param.detach())
                param.data = view


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride(), tensor.dtype


def _fingerprints(bucket: Bucket) -> list[tuple[tuple[int, ...], int]]:
    return [(tuple(p.shape), fingerprint(p)) for p in bucket.params]
