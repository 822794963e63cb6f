"""Totals of all ranks, as a table or a dict."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ds_comm.exchange.wire import bus_bytes
from ds_comm.log.comms_log import CommsLog
from ds_comm.log.totals import Key, Total


@dataclass(frozen=True, kw_only=True)
class Line:
    """The calls of one operation with one size, on one rank; waits are those of all ranks."""

    operation: str
    num_bytes: int
    ranks: int
    caller: str
    count: int
    timed: int
    total_s: float
    sent_bytes: float
    """Bytes that this rank has sent in all calls."""
    waits_s: Mapping[int, float]
    """Rank -> how much longer the operation took there than on the rank where it was shortest, over the last calls.
    Who arrives last waits least."""

    @property
    def mean_s(self) -> float:
        """Mean duration of a call; 0 if none was timed."""
        return self.total_s / self.timed if self.timed else 0.0

    @property
    def algorithmic_bytes_per_s(self) -> float:
        """Size of the tensor by duration."""
        return self.num_bytes / self.mean_s if self.mean_s else 0.0

    @property
    def bus_bytes_per_s(self) -> float:
        """Bytes that the best algorithm sends from each rank, by duration: comparable between operations and numbers of
        ranks, and with the bandwidth of the link.
        """
        return bus_bytes(self.operation, self.num_bytes, self.ranks) / self.mean_s if self.mean_s else 0.0

    @property
    def last_rank(self) -> int | None:
        """The rank that others waited for; None: it cannot be told."""
        if len(self.waits_s) < 2 or max(self.waits_s.values()) == 0.0:
            return None
        return min(self.waits_s, key=lambda rank: self.waits_s[rank])


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The recorded collectives of a rank, and what the other ranks waited."""

    lines: Sequence[Line]
    rank: int
    world_size: int

    def text(self, *, show_straggler: bool = False) -> str:
        """Returns a table.

        Args:
            show_straggler: add the longest wait for another rank in the last calls, and the rank waited for.
        """
        header = [
            "operation",
            "size",
            "ranks",
            "calls",
            "total ms",
            "mean ms",
            "algbw Gb/s",
            "busbw Gb/s",
            "sent",
        ]
        header += ["wait ms", "for rank"] if show_straggler else []
        rows = [header]
        for line in self.lines:
            row = [line.operation, _size(line.num_bytes), str(line.ranks), str(line.count)]
            row += [_number(1e3 * line.total_s, line), _number(1e3 * line.mean_s, line, 3)]
            row += [_number(8e-9 * line.algorithmic_bytes_per_s, line)]
            row += [_number(8e-9 * line.bus_bytes_per_s, line), _size(line.sent_bytes)]
            if show_straggler:
                last = line.last_rank
                row += ["-", "-"] if last is None else [f"{1e3 * max(line.waits_s.values()):.2f}", str(last)]
            rows.append([*row, line.caller])
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        table = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
            table.append("  ".join([row[0].ljust(widths[0]), *cells]) + _tail(row, header))
        return "\n".join([f"collectives of rank {self.rank} of {self.world_size}", *table])

    def as_dict(self, *, show_straggler: bool = False) -> dict[str, Any]:
        """Returns the structure of DeepSpeed's `log_summary(return_dict=True)`: operation -> size -> numbers."""
        summary: dict[str, dict[int, dict[str, Any]]] = {}
        straggler: dict[str, dict[int, dict[str, Any]]] = {}
        for line in self._merged():
            summary.setdefault(line.operation, {})[line.num_bytes] = {
                "count": line.count,
                "total_latency_ms": 1e3 * line.total_s,
                "avg_latency_ms": 1e3 * line.mean_s,
                "tput_avg_gbps": 8e-9 * line.algorithmic_bytes_per_s,
                "busbw_avg_gbps": 8e-9 * line.bus_bytes_per_s,
                "msg_size_bytes": line.num_bytes,
                "msg_size_str": _size(line.num_bytes),
            }
            straggler.setdefault(line.operation, {})[line.num_bytes] = {
                "total_straggler_ms": 1e3 * line.waits_s.get(self.rank, 0.0),
                "last_rank": line.last_rank,
            }
        return {
            "summary": summary,
            "straggler_analysis": straggler if show_straggler else None,
            "metadata": {
                "world_size": self.world_size,
                "rank": self.rank,
                "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        }

    def _merged(self) -> Sequence[Line]:
        """Lines of the same operation and size as one: those of several groups or callers."""
        merged: dict[tuple[str, int], Line] = {}
        for line in self.lines:
            key = line.operation, line.num_bytes
            other = merged.get(key)
            merged[key] = line if other is None else _sum(other, line)
        return list(merged.values())


def summarise(log: CommsLog, group: dist.ProcessGroup | None = None) -> Summary:
    """Returns the summary of `log`. Collective over `group` (None: all ranks), so that waits are known.

    An operation has no waits if not exactly its ranks have recorded it, with equal numbers of calls.
    """
    own = log.totals()
    if not (dist.is_available() and dist.is_initialized()):
        return _summary(own, {0: own}, 0, 1)
    every: list[Any] = [None] * dist.get_world_size(group)
    with log.inside():
        dist.all_gather_object(every, own, group=group)
    rank = dist.get_rank(group)
    return _summary(own, dict(enumerate(every)), rank, len(every))


def _summary(
    own: Mapping[Key, Total], every: Mapping[int, Mapping[Key, Total]], rank: int, world_size: int
) -> Summary:
    lines = [
        Line(
            operation=key.operation,
            num_bytes=key.num_bytes,
            ranks=key.ranks,
            caller=key.caller,
            count=total.count,
            timed=total.timed,
            total_s=total.time_s,
            sent_bytes=total.sent_bytes,
            waits_s=_waits({r: totals[key] for r, totals in every.items() if key in totals}, key.ranks),
        )
        for key, total in own.items()
    ]
    lines.sort(key=lambda line: -line.total_s)
    return Summary(lines=lines, rank=rank, world_size=world_size)


def _waits(totals: Mapping[int, Total], ranks: int) -> dict[int, float]:
    """Returns by rank the sum over the last calls of duration minus shortest duration."""
    same = len({(total.count, total.timed) for total in totals.values()}) == 1
    if len(totals) != ranks or not same:  # several groups of this size, or calls that cannot be assigned
        return {}
    calls = list(zip(*(total.recent_s for total in totals.values()), strict=True))
    return {r: sum(call[i] - min(call) for call in calls) for i, r in enumerate(totals)}


def _sum(a: Line, b: Line) -> Line:
    return Line(
        operation=a.operation,
        num_bytes=a.num_bytes,
        ranks=max(a.ranks, b.ranks),
        caller="",
        count=a.count + b.count,
        timed=a.timed + b.timed,
        total_s=a.total_s + b.total_s,
        sent_bytes=a.sent_bytes + b.sent_bytes,
        waits_s={r: a.waits_s.get(r, 0.0) + b.waits_s.get(r, 0.0) for r in {*a.waits_s, *b.waits_s}},
    )


def _number(value: float, line: Line, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if line.timed else "-"


def _tail(row: Sequence[str], header: Sequence[str]) -> str:
    return f"  {row[-1]}" if len(row) > len(header) and row[-1] else ""


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"
