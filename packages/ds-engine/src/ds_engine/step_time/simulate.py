"""Simulates one optimizer step of a rank: what it computes, and what it sends meanwhile.

[Note: a step as two queues]
All ranks of a data-parallel job do the same at the same time, so one stands for all. It has two queues, which run in
order: computation and messages. A message starts when what it sends has been computed and the messages before it are
done; a unit computes when its parameters have been gathered. As long as a message lasts, a part of the rank
(`Rates.occupies`) is busy with it: that part is added to the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_engine.step_time.rates import Rates


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A module whose parameters are gathered together, and its work in one micro-batch."""

    name: str
    numel: int
    forward_flops: float
    backward_flops: float
    """Recomputation included."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one rank does in a step. Bytes are those that it sends."""

    units: Sequence[Unit]
    """In the order of the forward."""
    ranks: int
    micro_batches: int
    gather_forward_bytes: float = 0.0
    """Of one forward, for all units; stage 3 only."""
    gather_backward_bytes: float = 0.0
    reduce_bytes: float = 0.0
    """Of one reduction of all gradients."""
    reduce_every_micro_batch: bool = False
    """Whether gradients are reduced in every backward; otherwise in the last one of a step."""
    buckets: int = 1
    """Messages of one reduction of all gradients, or of publishing the parameters."""
    publish_bytes: float = 0.0
    """Of the all-gather of updated parameters at the end of a step; stages 1 and 2 only."""
    accumulate_bytes: float = 0.0
    """Memory that is read and written in each backward for gradients: copies into buckets, sums."""
    optimizer_bytes: float = 0.0
    """Memory that the update reads and writes."""
    host_copy_bytes: float = 0.0
    """Copies between device and host in a step, in the busier direction."""
    disk_read_bytes: float = 0.0
    disk_write_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The predicted time of one optimizer step, in seconds."""

    total_s: float
    compute_s: float
    """Forward and backward without messages."""
    messages_s: float
    """Sum of all messages."""
    exposed_s: float
    """Part of the step in which the rank only waits for messages, or is busy with them."""
    update_s: float
    """Update of the parameters, with its copies and disk accesses."""

    def __str__(self) -> str:
        total, compute, update = (seconds_text(s) for s in (self.total_s, self.compute_s, self.update_s))
        messages, exposed = seconds_text(self.messages_s), seconds_text(self.exposed_s)
        return (
            f"{total} a step: forward and backward {compute}, update {update}, messages {messages}, of which {exposed} "
            "are not hidden"
        )


class _Queues:
    """The two queues of a rank."""

    def __init__(self, occupies: float) -> None:
        self.computed = 0.0
        """When the computations so far are done."""
        self.sent = 0.0
        """When the messages so far are done."""
        self.messages = 0.0
        self._occupies = occupies

    def compute(self, seconds: float, after: float = 0.0) -> None:
        self.computed = max(self.computed, after) + seconds

    def send(self, seconds: float) -> float:
        """Sends what has been computed now. Returns when it will have arrived."""
        self.sent = max(self.sent, self.computed) + seconds
        self.messages += seconds
        self.computed += self._occupies * seconds
        return self.sent


def simulate(work: Workload, rates: Rates) -> StepTime:
    """Predicts the time of one step."""
    queues = _Queues(rates.occupies)
    gather, reduce = rates.links(work.ranks)
    numel = max(sum(unit.numel for unit in work.units), 1)
    compute_s = 0.0

    def gather_s(unit: Unit, all_bytes: float) -> float:
        return gather.seconds(all_bytes * unit.numel / numel, work.ranks) if all_bytes and unit.numel else 0.0

    def run(units: Sequence[Unit], seconds: Sequence[float], gathered_bytes: float, reduces: bool) -> None:
        """Computes units in order. Each is gathered while the one before it computes."""
        waiting, bucket_numel = 0, numel / work.buckets
        arrives = queues.send(gather_s(units[0], gathered_bytes)) if gathered_bytes else 0.0
        for number, (unit, duration) in enumerate(zip(units, seconds, strict=True)):
            queues.compute(0.0, after=arrives)
            if gathered_bytes and number + 1 < len(units):
                arrives = queues.send(gather_s(units[number + 1], gathered_bytes))
            queues.compute(duration)
            waiting += unit.numel
            last = number + 1 == len(units)
            while reduces and waiting and (waiting >= bucket_numel or last):
                part = min(waiting, bucket_numel)
                queues.send(reduce.seconds(work.reduce_bytes * part / numel, work.ranks))
                waiting = 0 if waiting <= bucket_numel else int(waiting - bucket_numel)

    backwards = list(reversed(work.units))
    memory = work.accumulate_bytes / rates.memory_bytes_per_s
    forward_s = _durations(
        [u.forward_flops for u in work.units], rates.forward_flops_per_s, rates.forward_pass_s
    )
    backward_s = _durations(
        [u.backward_flops for u in backwards], rates.backward_flops_per_s, rates.backward_pass_s
    )
    backward_s = [
        seconds + memory * unit.numel / numel for seconds, unit in zip(backward_s, backwards, strict=True)
    ]
    for micro in range(work.micro_batches):
        run(work.units, forward_s, work.gather_forward_bytes, False)
        reduces = work.reduce_every_micro_batch or micro + 1 == work.micro_batches
        run(backwards, backward_s, work.gather_backward_bytes, reduces and work.reduce_bytes > 0)
        compute_s += sum(forward_s) + sum(backward_s)
    queues.compute(0.0, after=queues.sent)
    # What the update reads from a disk, computes and writes overlaps: the slowest of them counts.
    update_s = max(
        work.optimizer_bytes / rates.memory_bytes_per_s,
        work.disk_read_bytes / rates.disk_read_bytes_per_s
        + work.disk_write_bytes / rates.disk_write_bytes_per_s,
        work.host_copy_bytes / rates.device_host_bytes_per_s,
    )
    queues.compute(update_s)
    if work.publish_bytes:
        queues.compute(0.0, after=queues.send(gather.seconds(work.publish_bytes, work.ranks, work.buckets)))
    return StepTime(
        total_s=queues.computed,
        compute_s=compute_s,
        messages_s=queues.messages,
        exposed_s=max(0.0, queues.computed - compute_s - update_s),
        update_s=update_s,
    )


def _durations(flops: Sequence[float], flops_per_s: float, pass_s: float) -> list[float]:
    """Seconds of each unit in a pass. What the pass takes besides its operations is divided as they are."""
    total = sum(flops)
    return [one / flops_per_s + pass_s * (one / total if total else 1 / len(flops)) for one in flops]


def seconds_text(seconds: float) -> str:
    """A time: "1.5 s", "23 ms" or "45 us"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
