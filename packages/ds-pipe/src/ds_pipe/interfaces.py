"""The protocols of ds_pipe, in torch types only. Other packages implement them without importing it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from ds_pipe.actions import Action


class Work(Protocol):
    """An asynchronous operation; `wait` returns when its result may be used."""

    def wait(self) -> object: ...


class Shardable(Protocol):
    """Control of a stage whose parameters or gradients are divided among data-parallel ranks.

    The methods are those of torch's `FSDPModule`, so that a stage under `fully_shard` is its own control; that of a
    stage under ds_zero is `ds_zero.control(stage)`.
    """

    def unshard(self, async_op: bool = False) -> Work | None:
        """Gathers the parameters until `reshard`."""

    def reshard(self) -> None:
        """Drops the gathered parameters."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Sets whether backwards from now on reduce gradients."""


@runtime_checkable
class ReducesGradients(Protocol):
    """A control whose gradients are reduced by a call, and not by the last backward."""

    def reduce_gradients(self) -> None:
        """Reduces the gradients over data-parallel ranks; called once in every step."""


class Transport(Protocol):
    """Moves values between the pipeline ranks. Between two ranks, values arrive in the order in which they are sent.

    A value is a tensor, or tuples, lists and dicts of tensors and of anything that can be pickled. The label of a
    message is the receive, as `3RECV_F0`. No method but `receive` and `finish` waits for other ranks. All raise
    `PipelineError` when they learn that another rank has failed.
    """

    def send(self, rank: int, label: Action, value: Any) -> None:
        """Starts sending; the tensors must not change afterwards."""

    def expect(self, rank: int, label: Action) -> None:
        """Starts receiving the next message of a rank."""

    def receive(self, rank: int, label: Action) -> Any:
        """Waits for a message that is expected, and returns its value."""

    def finish(self) -> None:
        """Waits until all ranks have called it: afterwards, none of them can fail in this step any more."""

    def watched(self, end: Callable[[], None]) -> AbstractContextManager[None]:
        """Returns a context in which this rank may wait for all other ranks in a collective that it starts after its
        last action: it takes the place of `finish`. If a rank has failed, `end` is called from another thread, and has
        to end the collective with an error.
        """

    def fail(self, message: str) -> str:
        """Tells all ranks that this one cannot go on. Returns the first message that a rank has told."""

    def close(self) -> None:
        """Ends what runs in the background."""
