"""The protocols of stores of shards: what is stored, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ds_zero.interfaces.collectives import Work


@dataclass(frozen=True, kw_only=True)
class ShardKey:
    """Identifies one stored tensor of a rank. Tensors are stored by bucket, so `name` is the name of a bucket."""

    name: str
    kind: str
    """"param", "master", "grad", or the name of an optimizer state."""


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A 1-D tensor that a store must hold."""

    key: ShardKey
    partition: str
    """Reservations of one call with the same partition are contiguous, in the order given, as far as the store keeps
    them in the same addressable memory.
    """
    numel: int
    dtype: torch.dtype
    device: torch.device
    """Device of the model; the store decides where the tensor is stored."""


Tier = Literal["device", "host", "disk"]
"""Where a tensor is stored: on the device of the model, in host memory, or on a disk."""


class ChoosesTiers(Protocol):
    """Decides where each tensor of a rank is stored. A pure function, so that `plan` and a store decide alike."""

    def __call__(self, plan: Sequence[Reservation], /) -> Sequence[Tier]:
        """Returns the tier of each item. Besides tensors, `plan` has an item of kind "state" for each bucket with
        gradients, which stands for the states of its elements; its dtype has no meaning.
        """


class ShardStore(Protocol):
    """Stores a rank's shards between their uses: on the device, in host memory, or on a disk.

    A key is *addressable* if `reserve` returns a tensor for it. Otherwise it is *away*, and its values are accessed
    only by `load`, `store` and `sink_grad`. ds_zero starts an operation on a key only after it has waited for the
    previous one on that key; operations on different keys may run concurrently. Methods and `wait` may raise; the user
    gets a `ShardStoreError` that names bucket and kind.
    """

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[ShardKey, Tensor]:
        """Allocates zero-filled tensors, and returns those of addressable keys, which the optimizer then updates in
        place. May be called again, for partial sums of gradients: "b+1", "b+2", ... belong where the "grad" of "b" is.
        """

    def load(self, key: ShardKey, out: Tensor) -> Work:
        """Starts to copy the stored tensor into `out`, which has the same size and dtype."""

    def store(self, key: ShardKey, src: Tensor) -> Work:
        """Starts to store `src`, cast to the dtype of the reservation. The caller does not change `src` before it has
        waited for the operation.
        """

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        """Starts to write a reduced gradient to the stored one from element `offset` on, or, with `accumulate`, to add
        it. The sum is computed in the wider of both dtypes and rounded once. The caller does not change `grad` before
        it has waited for the operation.
        """

    def release(self, key: ShardKey) -> None:
        """Frees the tensor, which must not be used afterwards."""

    def close(self) -> None:
        """Frees everything. Safe to call twice."""


class ShardStoreError(RuntimeError):
    """A `ShardStore` failed to load or store a tensor; the message names the bucket, the kind and the store's error."""


@runtime_checkable
class MakesStaging(Protocol):
    """A store that allocates the staging buffers of tensors that are away, such as in pinned or aligned memory."""

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new 1-D tensor with undefined values. Without this method, staging buffers are ordinary tensors on
        `device`, the device of the model. The optimizer updates masters in these buffers, on their device.
        """
