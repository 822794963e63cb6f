"""Tells whether all ranks were given the same, before they rely on it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ds_zero.comm.ranks import Ranks, SimulatedGroup, ranks_of
from ds_zero.comm.thread_claim import GroupClaims

_SHOWN = 5


def digest(values: Mapping[str, str]) -> int:
    """31 bits that depend on every name and value; the same in every process."""
    return zlib.crc32(repr(sorted(values.items())).encode()) & 0x7FFFFFFF


def own_slot(ranks: Ranks, value: int) -> list[int]:
    """One number a rank: `value` in the place of this rank and zeros elsewhere. Summed over `ranks.axes`, they are the
    values of all ranks.
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
    """Compare `values` over `ranks`. Collective: one message of four bytes a rank where they are the same.

    Args:
        what: the call, for the error.
        ranks: those that compare; None: all of the default process group.
        device: where messages travel.
        remedy: the end of the error: what to do.

    Raises:
        ValueError: on every rank, if any rank has others; names what differs, with each rank's value.
        RuntimeError: another thread trains a model over one of these groups.
    """
    ranks = ranks_of(ranks)
    with GroupClaims([ranks], what):
        if not is_same(_exchanged(own_slot(ranks, digest(values)), ranks, device), ranks):
            raise ValueError(f"{what}: {differences(values, ranks)}. {remedy}")


def is_same(slots: Sequence[int], ranks: Ranks) -> bool:
    """Whether a sum of `own_slot` has the same value in every place; a simulated group sends none and agrees."""
    return isinstance(ranks.group, SimulatedGroup) or len(set(slots)) <= 1


def differences(values: Mapping[str, str], ranks: Ranks) -> str:
    """Which of `values` differ over `ranks`, and how. Collective."""
    of_rank: list[Mapping[str, str]] = [values]
    for axis in ranks.axes:
        if axis.group is not None:
            parts: list[list[Mapping[str, str]]] = [[] for _ in range(axis.size)]
            dist.all_gather_object(parts, of_rank, group=axis.group)
            of_rank = [one for part in parts for one in part]
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
    """Every rank's flag on every rank. Collective."""
    return [bool(flag) for flag in _exchanged(own_slot(ranks, int(own)), ranks, device)]
