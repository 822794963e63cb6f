"""The protocols of ds_zero, in torch types only. Each has a default implementation in this package; other packages
implement them without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

Reduction = Literal["none", "local", "sharded"]
"""When gradients are reduced. "none": only by the optimizer itself. "local": each rank accumulates whole gradients,
which are reduced once before a step. "sharded": in every backward.
"""


class Work(Protocol):
    """An asynchronous operation; `wait` returns when its result may be read (on a GPU: by the current stream)."""

    def wait(self) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Optional features of a collective beyond the signature of FSDP2's `Comm`, in the class attribute
    `capabilities`.

    Capabilities are not inherited: a subclass may override methods, so it must declare its own `capabilities`.
    """

    tags: bool = False
    """It has a method `bound(number, transport)`, which returns a collective whose messages have the tag `number`,
    and which exchanges tensors through the
    `Transport` with the ranks that it reaches."""
    uneven: bool = False
    """It takes an argument `sizes=`, the number of elements of each rank's slice if they differ. Without this
    capability, uneven slices are sent by other collectives."""
    dtypes: frozenset[torch.dtype] | None = None
    """The dtypes that it can send; None: all. Others are sent by the default collectives of the device."""
    pieces: bool = False
    """It sends directly from rank to rank and adds in the order of [Note: ordered reduction], which permits [Note:
    reduction without copying]."""

    def moves(self, dtype: torch.dtype) -> bool:
        """Whether the collective accepts tensors of this dtype."""
        return self.dtypes is None or dtype in self.dtypes


def capabilities_of(collective: object) -> Capabilities:
    """Returns the capabilities that the class of `collective` declares; none if it declares none."""
    declared = vars(type(collective)).get("capabilities")
    return declared if isinstance(declared, Capabilities) else Capabilities()


class AllGather(Protocol):
    """FSDP2's `Comm` for all-gather: `output` has `group.size()` times the elements of `input`, which may be a slice
    of it.
    """

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None: ...


class ReduceScatter(Protocol):
    """FSDP2's `Comm` for reduce-scatter: rank r receives the sum over ranks of slice r of `input`.

    `output` may have a wider dtype than `input` (fp32 from bf16). The sum is then computed in the wider dtype if the
    implementation supports it.
    """

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None: ...


@runtime_checkable
class CountsBytes(Protocol):
    """A collective that sends fewer or more bytes than its tensors have, so that bytes are counted correctly."""

    def sent_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes that one rank sends in one call.

        Args:
            numel: number of elements of the whole tensor, the slices of all ranks.
            size: number of ranks.
        """


class Leaves(Protocol):
    """A group that this process can leave."""

    def leave(self) -> None:
        """Ends the waits of other ranks for this one."""


class Abort(Protocol):
    """A flag that ends waits for other ranks."""

    @property
    def raised(self) -> bool: ...

    def add(self, member: Leaves, /) -> None:
        """Registers a group that this process leaves when the flag is raised."""


class Exchange(Work, Protocol):
    """One operation of a `Transport`. `wait_received` and `wait_sent` are the two halves of `wait`."""

    def reaches(self, rank: int) -> bool:
        """Whether tensors to and from `rank` are exchanged without messages."""

    def receive(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Expects `tensors` from `rank`; `wait_received` fills them."""

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Offers `tensors` to `rank`. They must not change before `wait_sent` returns."""

    def wait_received(self) -> None: ...
    def wait_sent(self) -> None: ...


class Transport(Protocol):
    """Exchanges tensors with some of the ranks of one group without messages of torch.distributed, for example with
    those on the same machine.
    """

    def exchange(self, tag: int) -> Exchange:
        """Returns a new operation. Operations with the same tag are matched in the order in which they start."""


class Connect(Protocol):
    """Finds the ranks of a group that a transport reaches; None if it reaches none from this rank. Collective."""

    def __call__(
        self, group: dist.ProcessGroup, device: torch.device, abort: Abort, /
    ) -> Transport | None: ...


class CollectivePair(Protocol):
    """Collectives for one kind of ranks; None: those of this package."""

    @property
    def all_gather(self) -> AllGather | None: ...
    @property
    def reduce_scatter(self) -> ReduceScatter | None: ...


class CollectiveSet(CollectivePair, Protocol):
    """The collectives of a model, as `ds_comm.collectives()` makes them."""

    @property
    def axes(self) -> Mapping[str, CollectivePair]:
        """Other collectives for some kinds of ranks, by the name of the kind: "data", "replicate", "expert" or
        "secondary".
        """

    @property
    def connect(self) -> Connect | None:
        """Finds ranks with which tensors are exchanged without messages; None: all ranks send messages."""


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


@runtime_checkable
class FusedStep(Protocol):
    """An optimizer that unscales, clips, updates and copies in one pass over memory."""

    def step_fused(
        self, params: Sequence[Tensor], *, grad_scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        """Steps `params`, any subset of the optimizer's parameters, with gradients `p.grad * grad_scale`. Writes a
        copy of the new `params[i]` to `out[i]`, in the dtype of `out[i]`.
        """


@runtime_checkable
class UndoableStep(FusedStep, Protocol):
    """An optimizer whose steps can be taken back, bit for bit."""

    def undo_bytes(self, params: Sequence[Tensor], *, with_values: bool = True) -> int:
        """Returns the bytes of memory that are needed to take back one step of `params`."""

    def step_undoable(
        self,
        params: Sequence[Tensor],
        *,
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        with_values: bool = True,
    ) -> None:
        """Steps as `step_fused`, until `rollback` or `commit`.

        Args:
            with_values: whether `rollback` restores `params`, too. If False, the caller does.
        """

    def rollback(self, params: Sequence[Tensor] | None = None) -> None:
        """Restores the states, and what was logged of the parameters, from before the last steps; of all parameters if
        None.
        """

    def commit(self) -> None:
        """Makes all steps final."""


@runtime_checkable
class TakesChecksums(Protocol):
    """An optimizer that computes checksums of tensors faster than `ds_zero.tensors.checksums`."""

    def checksums(self, tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Writes the checksums of each tensor's blocks to `out`: the same numbers, [Note: checksum of a block]."""


@runtime_checkable
class ChecksummedStep(TakesChecksums, Protocol):
    """An optimizer with `step_fused` that also computes the checksums of what it reads and writes, in one pass if
    possible.
    """

    def checksummed_states(self, param: Tensor) -> tuple[str, ...]:
        """Returns the names of the element-wise states of an entry."""

    def step_checksummed(
        self,
        params: Sequence[Tensor],
        *,
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        read: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        """As `FusedStep.step_fused`, for entries with a gradient.

        Args:
            read: for each entry, an int64 tensor of zeros of shape (rows, blocks). It receives the checksums of the
                gradient, of the entry and of its states, in the order of `checksummed_states`, before the update.
            written: the same after the update, except for the row of the gradient.
        """


@runtime_checkable
class MakesState(Protocol):
    """An optimizer that chooses the memory of its states: their dtype, their device."""

    def new_state(self, param: Tensor) -> Tensor:
        """Returns a zero-filled state of the shape of `param`. Without this method, states that are loaded before the
        first step have the dtype of the checkpoint and the device of the parameter.
        """


@runtime_checkable
class MakesNamedStates(Protocol):
    """An optimizer whose states have several dtypes, as 8-bit codes and the lower halves of masters."""

    def new_named_state(self, param: Tensor, name: str) -> Tensor:
        """As `MakesState.new_state`, for the state of this name."""


@runtime_checkable
class SplitsMasters(Protocol):
    """An optimizer that can extend bf16 parameters by 16 bits, its state "master_bits", to fp32 masters."""

    @property
    def split_masters(self) -> bool:
        """Whether it does so. Then masters of bf16 parameters are stored in bf16."""

    def join_master(self, param: Tensor, master_bits: Tensor) -> Tensor:
        """Returns the fp32 master."""

    def split_master(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bf16 parameter and the master bits of an fp32 master."""


@runtime_checkable
class PagesState(Protocol):
    """An optimizer that keeps its states away, except while it steps. `state[p]` reads a copy of them; a change of the
    copy would be lost.
    """

    @property
    def inner(self) -> Optimizer:
        """The optimizer that computes the steps. It shares the dicts in `param_groups`, and has no states."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the states where they are stored."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory into which states are loaded."""

    def stored_states(self, param: Tensor) -> tuple[Mapping[str, torch.dtype], Mapping[str, Any]]:
        """Returns the dtypes of the element-wise states of a parameter, and its other states, without loading anything.
        Both are empty if it has no states.
        """

    def states_opened(self, params: Sequence[Tensor], *, write: bool = False) -> AbstractContextManager[None]:
        """Context manager within which `state[p]` of these parameters is an ordinary dict of tensors in memory.

        Args:
            write: store the dicts when the context is left without an exception.
        """


@runtime_checkable
class PlansStates(Protocol):
    """An optimizer that cannot be stepped in a plan, because its step communicates."""

    def planned_states(self, num_ranks: int) -> Mapping[str, tuple[torch.dtype, float]]:
        """Returns its states in a job of so many ranks: name -> dtype, and number of elements for each element of a
        parameter.
        """

    def planned_bytes(self, numels: Sequence[int], num_ranks: int) -> int:
        """Returns the bytes that a rank sends in a step.

        Args:
            numels: number of elements of each parameter.
        """


@runtime_checkable
class SegmentStep(Protocol):
    """An optimizer whose update of an element needs sums over the whole tensor, such as LAMB. It has two passes; in
    between, the sums are added over the ranks that hold parts of the tensor.
    """

    def segment_sums(self, params: Sequence[Tensor], *, grad_scale: Tensor) -> Tensor:
        """First pass over `params` with gradients `p.grad * grad_scale`: updates states.

        Returns:
            An fp64 CPU tensor of shape (len(params), any): the sums to add over the parts of each tensor.
        """

    def step_segments(self, params: Sequence[Tensor], sums: Tensor, *, out: Sequence[Tensor | None]) -> None:
        """Second pass: updates `params`, given the sums over whole tensors. `out` as in `FusedStep`."""


@runtime_checkable
class WholeTensors(Protocol):
    """An optimizer that needs whole tensors, at least in some of its groups."""

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the tensors of this parameter group must not be split among ranks."""


class Norms(Protocol):
    """Returns the squared 2-norm of a list of tensors in fp64, and whether every element is finite."""

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[float, bool]: ...


Coordinates = Mapping[str, tuple[int, int]]
"""Name of a mesh axis -> (index on it, size of it), for the axes along which tensors of one name have different values.
Axes along which ranks hold the same values, or ranges of the same tensor, are not included."""

EVERYWHERE: Coordinates = MappingProxyType({})
"""Coordinates of a tensor that has the same values along all axes."""


class RecordSource(Protocol):
    """A checkpoint that is read by name and range. `ds_zero.load_records` reads exactly the ranges that this rank
    owns.
    """

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns the stored states of a parameter or buffer: name of the state -> (global shape, dtype). Empty if the
        checkpoint does not contain it.

        Raises an error that names the axes if the stored values differ along other axes, or along axes of other sizes.
        """

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        """Fills the 1-D `out` with elements [flat_offset, flat_offset + out.numel()) of the flattened tensor, cast to
        the dtype of `out`.
        """


class InitialValues(Protocol):
    """Provides the initial values of a parameter from `deferred_init` or `divided_init`."""

    stage: int | None
    """The stage that was passed to `deferred_init` or `divided_init`, or None."""

    def values(self, tensor: Tensor) -> Tensor:
        """Returns all values as a new tensor. Collective if ranks hold parts of them."""
        ...

    def place(self, tensor: Tensor) -> int:
        """Returns the index of the parameter in the order of construction, which is the same on every rank."""
        ...

    def hides(self, tensor: Tensor) -> bool:
        """Whether the parameter has no readable values at the moment."""
        ...

    def own(self, tensor: Tensor) -> Tensor | None:
        """Returns this rank's 1-D slice while the parameter is sharded; None if it has none."""
        ...
