"""Compares values over all ranks, before anything depends on them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_zero.comm.ranks import Ranks, SimulatedGroup, ranks_of
from ds_zero.comm.thread_claim import GroupClaims

_SHOWN = 5
T = TypeVar("T")


def digest(values: Mapping[str, str]) -> int:
    """Returns a 31-bit hash of all names and values, which is the same in every process."""
    return zlib.crc32(repr(sorted(values.items())).encode()) & 0x7FFFFFFF


def own_slot(ranks: Ranks, value: int) -> list[int]:
    """Returns a tensor with one element per rank: `value` at this rank's index and zeros elsewhere. Summed over
    `ranks.axes`, it contains the values of all ranks.
    """
    replicas = ranks.replicas
    place = ranks.rank + (replicas.rank * ranks.size if replicas is not None else 0)
    return [value if rank == place else 0 for rank in range(ranks.total)]


def _exchanged(slots: Sequence[int], ranks: Ranks, device: torch.device) -> list[int]:
    sums = torch.tensor(slots, dtype=torch.int32).to(device)
    for axis in ranks.axes:
        if axis.group is not None:
            dist.all_reduce(sums, group=axis.group)
    exchanged: list[int] = sums.tolist()
    return exchanged


def require_same(
    what: str, values: Mapping[str, str], ranks: Ranks | None, device: torch.device, remedy: str
) -> None:
    """Compares `values` over `ranks`. Collective: if they are equal, one message of four bytes per rank.

    Args:
        what: name of the call, for the error.
        ranks: the ranks to compare; None: all ranks of the default process group.
        device: device of the messages.
        remedy: the last sentence of the error.

    Raises:
        ValueError: on every rank, if values differ. The message names them, with the value of each rank.
        RuntimeError: another thread trains a model over one of these groups.
    """
    ranks = ranks_of(ranks)
    with GroupClaims([ranks], what):
        if not is_same(_exchanged(own_slot(ranks, digest(values)), ranks, device), ranks):
            raise ValueError(f"{what}: {differences(values, ranks)}. {remedy}")


def is_same(slots: Sequence[int], ranks: Ranks) -> bool:
    """Whether a sum of `own_slot` has the same value in every place; a simulated group sends none and agrees."""
    return len(set(slots)) <= 1 or any(isinstance(axis.group, SimulatedGroup) for axis in ranks.axes)


def gathered_values(value: T, axes: Sequence[Ranks]) -> list[T]:
    """Returns the values of all ranks of `axes`, on every rank, for messages about errors: values are pickled.
    Collective.
    """
    values = [value]
    for axis in axes:
        if axis.group is not None:
            parts: list[list[T]] = [[] for _ in range(axis.size)]
            dist.all_gather_object(parts, values, group=axis.group)
            values = [one for part in parts for one in part]
    return values


def differences(values: Mapping[str, str], ranks: Ranks) -> str:
    """Describes which of `values` differ over `ranks`, and how. Collective."""
    of_rank = gathered_values(values, ranks.axes)
    names = {name: None for one in of_rank for name in one}  # in order of appearance
    clauses = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(of_rank):
            ranks_of.setdefault(one.get(name, "not given"), []).append(rank)
        if len(ranks_of) > 1:
            values_of = " and ".join(f"{value} on {_listed(who)}" for value, who in ranks_of.items())
            clauses.append(f"{name} is {values_of}")
    more = f"; {len(clauses) - _SHOWN} more differ" if len(clauses) > _SHOWN else ""
    return "ranks differ: " + "; ".join(clauses[:_SHOWN]) + more


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"ranks {shown}" if len(ranks) > 1 else f"rank {shown}"


def gathered_flags(own: bool, ranks: Ranks, device: torch.device) -> list[bool]:
    """Returns the flags of all ranks on every rank. Collective."""
    return [bool(flag) for flag in _exchanged(own_slot(ranks, int(own)), ranks, device)]
