"""The protocols of ds_offload, in torch types only. A sharding package uses its own, which fit these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


class Work(Protocol):
    """An asynchronous operation; `wait` returns when it has finished, and raises its error."""

    def wait(self) -> object: ...


class Done:
    """A finished operation."""

    def wait(self) -> None:
        return None


class Key(Protocol):
    """Identifies one stored tensor; hashable."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...


class Reservation(Protocol):
    """A 1-D tensor that a store must hold. Tensors of one `partition` are stored contiguously."""

    @property
    def key(self) -> Key: ...
    @property
    def partition(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


Tier = Literal["device", "host", "disk"]
"""Where a tensor is stored: on the device of the model, in host memory, or on a disk."""


class ChoosesTiers(Protocol):
    """Decides where each tensor is stored. A pure function, so that a plan and a store decide alike."""

    def __call__(self, plan: Sequence[Reservation], /) -> Sequence[Tier]:
        """Returns the tier of each item. Beside the tensors of a store, `plan` has one item of kind "state" for each
        bucket with gradients, which stands for the states of its elements.
        """


class Store(Protocol):
    """Stores tensors between their uses. `HostStore` and `NVMeStore` implement it.

    A caller starts an operation on a key only after it has waited for the previous one on that key. Operations on
    different keys may run concurrently.
    """

    def reserve(self, plan: Sequence[PageReservation]) -> Mapping[Key, Tensor]:
        """Allocates tensors of zeros. Returns those that are in addressable memory; pages on the device of their
        parameters are then used where they are.
        """

    def load(self, key: PageKey, out: Tensor) -> Work:
        """Starts to copy the stored tensor into `out`, which has the same size and dtype."""

    def store(self, key: PageKey, src: Tensor) -> Work:
        """Starts to store `src`, which must not be changed before the operation has finished."""

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new 1-D tensor with undefined values, for `load` and `store`. `device` is that of the
        parameters.
        """

    def release(self, key: PageKey) -> None:
        """Frees the tensor, which must not be used afterwards."""

    def close(self) -> None:
        """Frees everything. Safe to call twice."""


@runtime_checkable
class KeepsStates(Protocol):
    """A store that decides where the optimizer states of a parameter are."""

    def state_tier(self, param: Tensor) -> Tier:
        """Returns where the states of an optimizer's entry belong."""


@dataclass(frozen=True, kw_only=True)
class PageKey:
    """Identifies one page of optimizer states in a store."""

    name: str
    owner: int
    """Distinguishes pages of optimizers that share a store."""
    kind: str = "state"


@dataclass(frozen=True, kw_only=True)
class PageReservation:
    """A page of optimizer states that a store must hold, as bytes."""

    key: PageKey
    numel: int
    device: torch.device
    tier: Tier | None = None
    """Where the page belongs; None: where the store keeps kind "state"."""
    partition: str = "states"
    dtype: torch.dtype = torch.uint8
