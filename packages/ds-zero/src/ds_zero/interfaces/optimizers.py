"""The optional protocols of optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer


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
class HasInitialStates(Protocol):
    """An optimizer whose first step of a parameter accepts some of its states without the others."""

    @property
    def initial_states(self) -> tuple[str, ...]:
        """The names of these states, such as "master_bits"."""


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
