"""Training state in host memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ds_core import arena
from ds_offload.interfaces import Done, Key, Reservation, Work


class _CopyEvent:
    """A copy on an accelerator's stream, with the tensor it must outlive."""

    def __init__(self, event: torch.Event, keep: Tensor) -> None:
        self._event, self._keep = event, keep

    def wait(self) -> None:
        self._event.synchronize()


class HostStore:
    """Keeps masters and gradients in host memory, so that the optimizer steps there; and, if asked, parameters.

    Pass it as `ds_zero.shard(..., store=HostStore())`. The memory comes from ds_core's huge-page arena; on a machine
    with an accelerator it comes from the pinned allocator instead, so that copies run while the device computes.
    """

    def __init__(self, kinds: Collection[str] = ("master", "grad", "state")) -> None:
        """
        Args:
            kinds: the kinds of tensors that are kept in host memory: "master", "grad", "param" (sharded parameters in
                their compute dtype), "state" (pages of a `PagedOptimizer`). Others stay on the device of the model.
        """
        self.kinds = frozenset(kinds)
        self._resting: dict[Key, Tensor] = {}

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[Key, Tensor]:
        """Allocates zero-filled tensors. Tensors of one partition are views of one allocation, in the order of
        `plan`.
        """
        partitions: dict[tuple[str, torch.dtype], list[Reservation]] = {}
        for item in plan:
            partitions.setdefault((item.partition, item.dtype), []).append(item)
        reserved: dict[Key, Tensor] = {}
        for (_, dtype), items in partitions.items():
            device = items[0].device
            on_host = items[0].key.kind in self.kinds
            numel = sum(i.numel for i in items)
            whole = (
                host_memory(numel, dtype, device)
                if on_host
                else torch.empty(numel, dtype=dtype, device=device)
            )
            whole.zero_()
            for item, part in zip(items, torch.split(whole, [i.numel for i in items]), strict=True):
                reserved[item.key] = part
        self._resting.update(reserved)
        return reserved

    def load(self, key: Key, out: Tensor) -> Work:
        """Copies the stored tensor into `out`."""
        return _copy(self._resting[key], out)

    def store(self, key: Key, src: Tensor) -> Work:
        """Copies `src` into the store."""
        return _copy(src, self._resting[key])

    def sink_grad(self, key: Key, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        """Copies a reduced gradient into the store, or adds it if `accumulate`; the host adds."""
        place = self._resting[key][offset : offset + grad.numel()]
        if not accumulate:
            return _copy(grad, place)
        place.add_(grad.to(place.device))
        return Done()

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new tensor on `device`, where an optimizer reads and writes pages that rest on the host."""
        return torch.empty(numel, dtype=dtype, device=device)

    def release(self, key: Key) -> None:
        """Removes one tensor. The memory of its partition is freed with the last one."""
        self._resting.pop(key, None)

    def close(self) -> None:
        """Removes all tensors."""
        self._resting.clear()


def host_memory(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a CPU tensor with undefined values: in page-locked memory if `device` is an accelerator, else in huge
    pages.
    """
    if device.type == "cpu":
        return arena.empty(numel, dtype)
    return torch.empty(numel, dtype=dtype, pin_memory=True)


def _copy(src: Tensor, dst: Tensor) -> Work:
    if src.device == dst.device:
        dst.copy_(src)
        return Done()
    dst.copy_(src, non_blocking=True)
    event = torch.Event(device=(src if src.device.type != "cpu" else dst).device)
    event.record()
    return _CopyEvent(event, src)
