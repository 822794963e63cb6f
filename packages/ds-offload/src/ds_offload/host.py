"""Training state in host memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ds_core import host_limits, pinned
from ds_offload.interfaces import ChoosesTiers, Done, Key, Reservation, Tier, Work
from ds_offload.tiers import KnownTiers, TiersByKind


class _CopyEvent:
    """A copy on an accelerator's stream, with the tensor it must outlive."""

    def __init__(self, event: torch.Event, keep: Tensor) -> None:
        self._event, self._keep = event, keep

    def wait(self) -> None:
        self._event.synchronize()


class HostStore:
    """Keeps masters and gradients in host memory, so that the optimizer steps there; and, if asked, parameters.

    Pass it as `ds_zero.shard(..., store=HostStore())`. The memory comes from ds_core's huge-page arena; on a machine
    with an accelerator it is page-locked, so that copies run while the device computes.
    """

    def __init__(
        self,
        kinds: Collection[str] = ("master", "grad", "state"),
        *,
        tiers: ChoosesTiers | None = None,
        pin: bool = True,
    ) -> None:
        """
        Args:
            kinds: the kinds of tensors that are kept in host memory: "master", "grad", "param" (sharded parameters in
                their compute dtype), "state" (pages of a `PagedOptimizer`). Others stay on the device of the model.
            tiers: instead of `kinds`, decides for each tensor, such as `TiersByKind(host=..., ratio=0.5)`; it must
                not choose "disk".
            pin: page-lock the memory if the device of the model is an accelerator, so that copies run while it
                computes.
        """
        self.kinds = frozenset(kinds)
        self.tiers = KnownTiers(tiers or TiersByKind(host=self.kinds))
        self.pin = pin
        self._resting: dict[Key, Tensor] = {}
        self._held: dict[int, list[Key]] = {}
        """Address of a storage -> keys of the tensors in it."""

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[Key, Tensor]:
        """Allocates zero-filled tensors. Tensors of one partition that are in the same memory are views of one
        allocation, in the order of `plan`.
        """
        return self.reserve_in(plan, self.tiers.of(plan))

    def reserve_in(self, plan: Sequence[Reservation], tiers: Sequence[Tier]) -> Mapping[Key, Tensor]:
        """As `reserve`, with the tier of each tensor: "host" or "device"."""
        partitions: dict[tuple[str, torch.dtype, Tier], list[Reservation]] = {}
        for item, tier in zip(plan, tiers, strict=True):
            if tier == "disk":
                raise ValueError(
                    f"HostStore: the {item.key.kind} of {item.key.name!r} belongs on a disk: use an NVMeStore"
                )
            partitions.setdefault((item.partition, item.dtype, tier), []).append(item)
        _check_room(plan, tiers)
        reserved: dict[Key, Tensor] = {}
        for (_, dtype, tier), items in partitions.items():
            device = items[0].device
            numel = sum(i.numel for i in items)
            whole = (
                host_memory(numel, dtype, device, pin=self.pin)
                if tier == "host"
                else torch.empty(numel, dtype=dtype, device=device)
            )
            whole.zero_()
            for item, part in zip(items, torch.split(whole, [i.numel for i in items]), strict=True):
                reserved[item.key] = part
            self._held.setdefault(whole.untyped_storage().data_ptr(), []).extend(i.key for i in items)
        self._resting.update(reserved)
        return reserved

    def state_tier(self, param: Tensor) -> Tier:
        """Returns where the states of an optimizer's entry belong: with the master of its bucket if that is on the
        device, as the tiers say if it is in host memory.
        """
        name = self.bucket_of(param)
        chosen = self.tiers.of_states(name) if name is not None else None
        return chosen or ("host" if "state" in self.kinds else "device")

    def bucket_of(self, param: Tensor) -> str | None:
        """Returns the bucket of an entry whose master or gradient is addressable; None if there is none."""
        for tensor in (param, param.grad):
            if tensor is None or not tensor.numel():
                continue
            for key in self._held.get(tensor.untyped_storage().data_ptr(), ()):
                whole = self._resting.get(key)
                if whole is not None and 0 <= tensor.data_ptr() - whole.data_ptr() < whole.nbytes:
                    return key.name
        return None

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
        self._held.clear()


def _check_room(plan: Sequence[Reservation], tiers: Sequence[Tier]) -> None:
    """Raises `NotEnoughMemory` if the host has no room for what belongs there."""
    sizes = [i.numel * i.dtype.itemsize for i, tier in zip(plan, tiers, strict=True) if tier == "host"]
    if sum(sizes):
        host_limits.require(
            f"{len(sizes)} tensors in host memory",
            sum(sizes),
            host_limits.memory_limits(),
            rank=host_limits.Rank(number=int(os.environ.get("RANK", "0"))),
            instead=["keep fewer kinds of state in host memory, or keep them on a disk (NVMeStore)"],
        )


def host_memory(numel: int, dtype: torch.dtype, device: torch.device, *, pin: bool = True) -> Tensor:
    """Returns a CPU tensor with undefined values on huge pages, which are locked if `pin` is set and `device` is an
    accelerator: see `ds_core.pinned`.
    """
    return pinned.empty(numel, dtype, pinned.choose(pin, device.type))


def _copy(src: Tensor, dst: Tensor) -> Work:
    if src.device == dst.device:
        dst.copy_(src)
        return Done()
    dst.copy_(src, non_blocking=True)
    event = torch.Event(device=(src if src.device.type != "cpu" else dst).device)
    event.record()
    return _CopyEvent(event, src)
