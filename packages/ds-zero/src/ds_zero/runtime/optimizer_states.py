"""Access to the states of an optimizer that may keep them away."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from ds_zero.interfaces import PagesState, SplitsMasters

MASTER_BITS = "master_bits"


def states_opened(
    optimizer: object, shards: Sequence[Tensor], *, write: bool = False
) -> AbstractContextManager[None]:
    """Context manager within which `optimizer.state[shard]` is a dict of tensors in memory, for each of `shards`.

    Args:
        write: whether states are changed. If the optimizer keeps them away, they are stored when the context is left
            without an exception.
    """
    if isinstance(optimizer, PagesState):
        return optimizer.states_opened(shards, write=write)
    return nullcontext()


def splits_masters(optimizer: object) -> SplitsMasters | None:
    """Returns the optimizer that computes the steps if it keeps masters of bf16 parameters in two halves."""
    while isinstance(optimizer, PagesState):
        optimizer = optimizer.inner
    return optimizer if isinstance(optimizer, SplitsMasters) and optimizer.split_masters else None
