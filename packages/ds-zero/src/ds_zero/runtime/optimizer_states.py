"""Access to the states of an optimizer that may keep them away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_zero.interfaces import MakesNamedStates, MakesState, PagesState, SplitsMasters

MASTER_BITS = "master_bits"
"""The state with the lower halves of masters, [Note: split masters]."""

_PART_NUMEL = 1 << 20
"""Elements that are split at a time, so that temporary tensors stay small."""


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


def new_state(optimizer: Optimizer, shard: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Allocates one optimizer state: by the optimizer's `new_named_state` or `new_state`, which chooses the device, if
    it has one.

    Raises:
        ValueError: the optimizer keeps codes and `dtype` has numbers, or the other way round.
    """
    if isinstance(optimizer, MakesNamedStates):
        made = optimizer.new_named_state(shard, name)
    elif isinstance(optimizer, MakesState):
        made = optimizer.new_state(shard)
    else:
        made = torch.zeros_like(shard, dtype=dtype)
    check_convertible(name, made.dtype, dtype)
    return made.detach()


def check_convertible(name: str, own: torch.dtype, saved: torch.dtype) -> None:
    """Raises ValueError if a saved state of dtype `saved` has no meaning in dtype `own`: codes are no numbers."""
    if own != saved and not (own.is_floating_point and saved.is_floating_point):
        raise ValueError(
            f"optimizer state {name!r} was saved as {saved}, but this optimizer keeps it as {own}: resume with the "
            "same state_dtype, or load without optimizer states"
        )


# [Note: split masters] An optimizer may keep an fp32 master as the bf16 parameter, rounded to nearest with ties away
# from zero, and 16 more bits in the state "master_bits" (`interfaces.SplitsMasters`). Then the masters of a bucket are
# stored in bf16. The bits of the initial values are the only state before the first step, so that training starts from
# the exact weights of an fp32 model; bf16 weights have none.


def split_values(splits: SplitsMasters, exact: Tensor, high: Tensor, begin: int, low: Tensor) -> None:
    """Splits 1-D masters.

    Args:
        high: receives the bf16 parameters of all of them.
        begin: index of the first element whose bits are wanted.
        low: (numel,) int16, receives the bits of the elements from `begin` on.
    """
    for start in range(0, exact.numel(), _PART_NUMEL):
        part = exact[start : start + _PART_NUMEL].float()
        rounded, bits = splits.split_master(part)
        high[start : start + part.numel()].copy_(rounded)
        first, last = max(start, begin), min(start + part.numel(), begin + low.numel())
        if first < last:
            low[first - begin : last - begin].copy_(bits[first - start : last - start])


def set_master_bits(optimizer: Optimizer, shards: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    """Gives optimizer entries the bits of their masters, whether they have other states or not."""
    with states_opened(optimizer, shards, write=True):
        for shard, own in zip(shards, bits, strict=True):
            if not shard.numel():
                continue
            held = optimizer.state[shard]
            if MASTER_BITS not in held:
                held[MASTER_BITS] = new_state(optimizer, shard, MASTER_BITS, torch.int16)
            held[MASTER_BITS].view(-1).copy_(own.reshape(-1))


def joined_masters(
    optimizer: Optimizer | None,
    shards: Sequence[Tensor],
    cut: Callable[[Tensor], Sequence[Tensor]],
    values: Tensor,
) -> Tensor:
    """Returns the fp32 masters of a bucket, given its bf16 values.

    Args:
        cut: returns the views of a 1-D tensor that belong to `shards`.
    """
    joined = values.float()
    splits = splits_masters(optimizer)
    if optimizer is None or splits is None:
        return joined
    with states_opened(optimizer, shards):
        for shard, part, own in zip(shards, cut(values), cut(joined), strict=True):
            bits = optimizer.state[shard].get(MASTER_BITS) if shard in optimizer.state else None
            if isinstance(bits, Tensor):
                own.copy_(splits.join_master(part, bits.to(part.device).view(part.shape)))
    return joined


def clear_master_bits(
    optimizer: Optimizer | None, shards: Sequence[Tensor], changed: Sequence[Tensor]
) -> None:
    """Clears the bits of the masters of elements that were given new bf16 values.

    Args:
        changed: bool, for each of `shards`.
    """
    if optimizer is None:
        return
    with states_opened(optimizer, shards, write=True):
        for shard, mask in zip(shards, changed, strict=True):
            bits = optimizer.state[shard].get(MASTER_BITS) if shard in optimizer.state else None
            if isinstance(bits, Tensor):
                bits.view(-1).masked_fill_(mask.reshape(-1).to(bits.device), 0)
