"""Storage of the inputs of a checkpointed function between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""pack and unpack."""


class StoredInput(Protocol):
    """One stored tensor. Its memory is freed with this object."""

    num_bytes: int
    """Bytes allocated on this rank; 0 if the caller's own tensor is kept."""

    def restore(self) -> Tensor:
        """Returns the tensor, detached, on its original device."""


class Slab:
    """One allocation, divided into slots of `numel` elements. Inputs that are allocated and freed one by one fragment
    memory; slots of one allocation do not.
    """

    def __init__(self, numel: int, slots: int, like: Tensor) -> None:
        pinned = like.device.type == "cpu" and torch.accelerator.is_available()
        self.numel = numel
        self.storage = torch.empty(numel * slots, dtype=like.dtype, device=like.device, pin_memory=pinned)
        self._free = list(range(slots))

    def take(self, owner: object) -> Tensor | None:
        """Returns a slot that is taken until `owner` is deleted; None if all slots are taken."""
        if not self._free:
            return None
        index = self._free.pop(0)
        weakref.finalize(owner, self._free.append, index)
        return self.storage[index * self.numel : (index + 1) * self.numel]


class Slabs:
    """Slots of any size and dtype. A new slab of `slots` slots is allocated if no slot of that size is free."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._slabs: dict[tuple[torch.dtype, torch.device, int], list[Slab]] = {}

    def allocate(self, tensor: Tensor, owner: object) -> Tensor:
        """Returns a 1-D slot with as many elements as `tensor`, on its device. It is taken until `owner` is deleted."""
        slabs = self._slabs.setdefault((tensor.dtype, tensor.device, tensor.numel()), [])
        for slab in slabs:
            slot = slab.take(owner)
            if slot is not None:
                return slot
        slabs.append(Slab(tensor.numel(), self._slots, tensor))
        slot = slabs[-1].take(owner)
        assert slot is not None
        return slot

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs, used or not."""
        return sum(s.storage.nbytes for slabs in self._slabs.values() for s in slabs)


class OriginalInput:
    """The caller's tensor itself, not a copy."""

    num_bytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version

    def restore(self) -> Tensor:
        if self._version is not None and self._tensor._version != self._version:
            raise RuntimeError(
                f"an input of shape {tuple(self._tensor.shape)} of a checkpointed function was changed in place "
                "after the call, so the recomputation would give wrong gradients. Change a copy instead, or let "
                "inputs be copied (contiguous=True)"
            )
        return self._tensor.detach()


class PackedInput:
    """What the enabled hooks of `torch.autograd.graph.saved_tensors_hooks` keep in place of the tensor, for example a
    copy that ds_offload has moved. They see the tensors that a function saves; a recomputed one saves only its inputs.
    """

    num_bytes = 0

    def __init__(self, tensor: Tensor, hooks: Hooks) -> None:
        pack, self._unpack = hooks
        with torch.no_grad():
            self._packed = pack(tensor)

    def restore(self) -> Tensor:
        return self._unpack(self._packed).detach()


def enabled_hooks() -> Hooks | None:
    """Returns the hooks for saved tensors that are enabled in this thread; None if there are none, or if they are those
    of an enclosing recomputation, which must see the same tensors each time.
    """
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None or hooks[0].__module__ == "torch.utils.checkpoint" else hooks


class CopiedInput:
    """A copy: partitioned over a group, in host memory, in a slot of a slab, or any of these together.

    Model-parallel ranks hold the same activations between layers. Each rank of the group therefore stores 1/N of the
    tensor, and all of them gather it before backward.
    """

    def __init__(
        self, tensor: Tensor, *, group: dist.ProcessGroup | None, on_host: bool, slabs: Slabs | None
    ) -> None:
        self._shape, self._device, self._group = tensor.shape, tensor.device, group
        flat = tensor.detach().reshape(-1)
        self._numel = flat.numel()
        if group is not None:
            flat = _own_slice(flat, group)
        if on_host:
            flat = _to_host(flat)
        if slabs is not None:
            self._copy = slabs.allocate(flat, self)
            self._copy.copy_(flat)
        elif flat.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            self._copy = flat.clone()  # a view would keep the whole tensor alive
        else:
            self._copy = flat
        self.num_bytes = self._copy.nbytes

    def restore(self) -> Tensor:
        flat = self._copy
        if self._group is not None:
            flat = _gathered(flat.to(self._device, non_blocking=True), self._group)[: self._numel]
        # New memory, not a view of the copy: the function may write into its inputs.
        out = torch.empty(self._shape, dtype=flat.dtype, device=self._device)
        out.view(-1).copy_(flat, non_blocking=True)
        return out


def _own_slice(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    each = -(-flat.numel() // group.size())
    begin = min(group.rank() * each, flat.numel())
    own = flat[begin : begin + each]
    if own.numel() == each:
        return own
    return torch.cat([own, own.new_zeros(each - own.numel())])


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = own.new_empty(own.numel() * group.size())
    # New versions of torch warn about the old name; old versions do not have the new one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, own, group=group)
    return whole


def _to_host(flat: Tensor) -> Tensor:
    if flat.device.type == "cpu":
        return flat
    # Both copies run on the current stream, so the host does not wait for them.
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
