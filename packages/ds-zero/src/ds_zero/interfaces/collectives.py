"""The protocols of collectives, transports and their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ds_zero.interfaces.stores import ShardStore

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


@runtime_checkable
class CountsBuffers(CountsBytes, Protocol):
    """A collective that needs memory while it runs, which a plan counts."""

    def buffer_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes of the buffers of one call, arguments as for `sent_bytes`."""


@runtime_checkable
class CountsState(CountsBytes, Protocol):
    """A collective that keeps memory between calls, which a plan counts."""

    def state_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes that are kept for one bucket, arguments as for `sent_bytes`."""


@runtime_checkable
class ReducesBuckets(Protocol):
    """A reduce-scatter that keeps something between the reductions of one bucket, such as what rounding lost."""

    def for_bucket(self, name: str | None, /) -> ReduceScatter:
        """Returns the collective for the bucket `name`; None: for a reduction whose result no step uses."""


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


class RecordsCollectives(Protocol):
    """Counts and times collectives."""

    def begin(self, operation: str, num_bytes: int, ranks: int) -> Callable[[int], None] | None:
        """Counts a call. Returns a function to call once at its end, with the bytes that this rank has sent; None: the
        call is not recorded.

        Args:
            operation: name of the collective.
            num_bytes: of its largest tensor on this rank.
            ranks: number of ranks that take part.
        """

    def inside(self) -> AbstractContextManager[None]:
        """Context manager around the work of a recorded call: calls in it are parts of that one."""


class FrozenParams(Protocol):
    """How parameters that need no gradient are stored and gathered at stage 3, such as in fewer bits."""

    @property
    def all_gather(self) -> AllGather: ...

    def stored_in(self, store: ShardStore) -> ShardStore:
        """Returns a store that keeps frozen parameters in a form of its own, and everything else in `store`."""

    def stored_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Returns the bytes in which it keeps a tensor."""


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

    @property
    def log(self) -> RecordsCollectives | None:
        """Records what is gathered and reduced; None: nothing does."""

    @property
    def frozen(self) -> FrozenParams | None:
        """How frozen parameters are stored and gathered; None: as the others."""
