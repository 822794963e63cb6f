"""Moves sharded state to host memory temporarily, to free accelerator memory for other work.

[Note: storages are emptied and refilled]
Several objects are views of one storage: shards in the optimizer's groups, parameters in the module, partitions in the
store. So the tensors are not replaced. Instead, the contents of the storage are copied to host memory, and the storage
is resized to 0. Later it is resized back and filled again, so that all views stay valid. In the meantime, tensors that
a user can access refer to the copy in host memory, so reading them gives the right values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.interfaces import PagesState
from ds_zero.runtime.storage import GRAD, MASTER, PARAM
from ds_zero.state import ZeroState

OPTIM_STATES, HP_PARAMS, LP_PARAMS, LP_GRADS = "optim_states", "hp_params", "lp_params", "lp_grads"


@dataclass
class _Moved:
    """One storage that was moved."""

    storage: torch.UntypedStorage
    host: Tensor
    """Its contents."""
    shown: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Tensors that refer to the copy on the host, and their original data."""

    def show(self, tensor: Tensor) -> None:
        was = tensor.data
        self.shown.append((tensor, was))
        width = was.element_size()
        begin, end = was.storage_offset() * width, self.host.numel() // width * width
        values = self.host[begin:end].view(was.dtype)
        tensor.data = values.as_strided(was.shape, was.stride())

    def bring_back(self, *, non_blocking: bool) -> None:
        self.storage.resize_(self.host.numel())
        _bytes_of(self.storage).copy_(self.host, non_blocking=non_blocking)
        for tensor, was in self.shown:
            tensor.data = was


class Away:
    """Moves state of a sharded model from the accelerator to host memory; `back` moves it back.

    Meanwhile the model cannot be trained or saved; forward works if the parameters ("lp_params") were not moved. State
    that is in host memory already, or that the store keeps away, is not touched. One storage may serve several kinds
    (fp32 parameters are their own masters): it moves only if all of these kinds are named.
    """

    KINDS = (OPTIM_STATES, HP_PARAMS, LP_PARAMS, LP_GRADS)
    """Optimizer states; fp32 masters; parameters in their compute dtype; reduced gradients."""

    def __init__(
        self,
        model: nn.Module,
        kinds: Collection[str] = KINDS,
        *,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """
        Args:
            kinds: any of `KINDS`.
            pin_memory: use page-locked host memory for the copies.
            non_blocking: return before the copies are complete; synchronize before reading them.

        Raises:
            ValueError: a kind is unknown, or the model is not sharded.
        """
        unknown = sorted(set(kinds) - set(self.KINDS))
        if unknown:
            raise ValueError(f"unknown kind of state {unknown[0]!r}: known are {', '.join(self.KINDS)}")
        state = _registry.state_of(model)
        state.stepper.settle()
        state.gatherer.drop_all()
        self.kinds = frozenset(kinds)
        self._moved: dict[int, _Moved] = {}
        needed: dict[int, set[str]] = {}
        movable = [(kind, tensor) for kind, tensor in _held(state) if _movable(tensor)]
        for kind, tensor in movable:
            needed.setdefault(tensor.untyped_storage().data_ptr(), set()).add(kind)
        for _, tensor in movable:
            storage = tensor.untyped_storage()
            where = storage.data_ptr()
            if where not in self._moved and needed[where] <= self.kinds:
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin_memory)
                self._moved[where] = _Moved(
                    storage, host.copy_(_bytes_of(storage), non_blocking=non_blocking)
                )
        for tensor in _reachable(state):
            if _movable(tensor) and tensor.untyped_storage().data_ptr() in self._moved:
                self._moved[tensor.untyped_storage().data_ptr()].show(tensor)
        for moved in self._moved.values():
            moved.storage.resize_(0)
        if self._moved and not non_blocking:
            torch.accelerator.synchronize()
        if self._moved:
            torch.accelerator.empty_cache()  # so that other processes can use the memory, too

    @property
    def num_bytes(self) -> int:
        """Bytes of accelerator memory that the move has freed."""
        return sum(moved.host.numel() for moved in self._moved.values())

    def back(self, *, non_blocking: bool = False) -> None:
        """Moves everything back. A second call has no effect."""
        for moved in self._moved.values():
            moved.bring_back(non_blocking=non_blocking)
        if self._moved and not non_blocking:
            torch.accelerator.synchronize()
        self._moved.clear()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _movable(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and tensor.untyped_storage().nbytes() > 0


def _held(state: ZeroState) -> Iterator[tuple[str, Tensor]]:
    """Yields (kind, tensor) for all state; a tensor that belongs to several kinds is yielded for each of them."""
    for held in _states(state):
        yield from ((OPTIM_STATES, v) for v in held.values() if isinstance(v, Tensor) and v.ndim > 0)
    for bucket in state.buckets:
        yield LP_PARAMS, bucket.full
        if bucket.secondary is not None:
            yield LP_PARAMS, bucket.secondary.tensor
        for kind, named in ((PARAM, LP_PARAMS), (MASTER, HP_PARAMS), (GRAD, LP_GRADS)):
            tensor = bucket.storage.addressable(kind)
            if tensor is not None:
                yield named, tensor
        yield from ((LP_GRADS, shard.grad) for shard in bucket.shards if shard.grad is not None)


def _states(state: ZeroState) -> Iterable[Mapping[str, object]]:
    """Returns the optimizer's states of each shard; none if the optimizer keeps them away."""
    optimizer = state.optimizer() if state.optimizer is not None else None
    return () if optimizer is None or isinstance(optimizer, PagesState) else optimizer.state.values()


def _reachable(state: ZeroState) -> Iterator[Tensor]:
    """Yields the tensors that other code can access, each once."""
    every: list[Tensor] = [p for bucket in state.buckets for p in (*bucket.params, *bucket.shards)]
    every += [shard.grad for bucket in state.buckets for shard in bucket.shards if shard.grad is not None]
    for held in _states(state):
        every += [value for value in held.values() if isinstance(value, Tensor)]
    yield from {id(tensor): tensor for tensor in every}.values()
