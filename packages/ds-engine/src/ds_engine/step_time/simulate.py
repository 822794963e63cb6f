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
class Inside:
    """Messages within the layers of a model over one axis, in one micro-batch. Computation waits for them."""

    axis: str
    """"tensor", "expert" or "sequence"."""
    ranks: int
    forward_bytes: float
    """That a rank sends in a forward."""
    forward_messages: int
    backward_bytes: float
    backward_messages: int

    def seconds(self, rates: Rates) -> tuple[float, float]:
        """Durations in a forward and in a backward. The ranks of these axes follow each other."""
        link, _ = rates.links(self.ranks)
        return (
            link.seconds(self.forward_bytes, self.ranks, self.forward_messages),
            link.seconds(self.backward_bytes, self.ranks, self.backward_messages),
        )


@dataclass(frozen=True, kw_only=True)
class AxisTime:
    """What the messages of one axis are in a step."""

    axis: str
    ranks: int
    sent_bytes: float
    """By a rank."""
    seconds: float
    """Sum of all its messages."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one rank does in a step. Bytes are those that it sends."""

    units: Sequence[Unit]
    """In the order of the forward."""
    ranks: int
    """Over which gradients are reduced."""
    micro_batches: int
    stride: int = 1
    """How far apart these ranks are: the number of ranks that together hold one model."""
    inside: Sequence[Inside] = ()
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
    shares_state: bool = False
    """Whether ranks divide the state of the model among them, as from stage 1 on."""
    host_copy_bytes: float = 0.0
    """Copies between device and host in a step, in the busier direction."""
    disk_read_bytes: float = 0.0
    disk_write_bytes: float = 0.0

    def axes(self, rates: Rates | None = None, data_s: float = 0.0) -> tuple[AxisTime, ...]:
        """The messages of each axis in a step. Those of the data axis are gathers, reductions and what is published.

        Args:
            rates: None: times are 0.
            data_s: duration of the messages of the data axis.
        """
        micro = self.micro_batches
        sent = micro * (self.gather_forward_bytes + self.gather_backward_bytes) + self.publish_bytes
        sent += self.reduce_bytes * (micro if self.reduce_every_micro_batch else 1)
        axes = []
        if self.ranks > 1:
            axes.append(AxisTime(axis="data", ranks=self.ranks, sent_bytes=sent, seconds=data_s))
        for one in self.inside:
            bytes_of_step = micro * (one.forward_bytes + one.backward_bytes)
            seconds = 0.0 if rates is None else micro * sum(one.seconds(rates))
            axes.append(AxisTime(axis=one.axis, ranks=one.ranks, sent_bytes=bytes_of_step, seconds=seconds))
        return tuple(axes)


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
    axes: tuple[AxisTime, ...] = ()
    """Messages of each axis with several ranks."""

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
    passes = _Passes(work, rates)
    forward_s, backward_s = passes.forward_s(), passes.backward_s()
    backwards = list(reversed(work.units))
    inside = [one.seconds(rates) for one in work.inside]
    inside_s = sum(forward + backward for forward, backward in inside)
    compute_s = 0.0
    for micro in range(work.micro_batches):
        passes.run(queues, work.units, forward_s, work.gather_forward_bytes, False)
        reduces = work.reduce_every_micro_batch or micro + 1 == work.micro_batches
        passes.run(
            queues, backwards, backward_s, work.gather_backward_bytes, reduces and work.reduce_bytes > 0
        )
        compute_s += sum(forward_s) + sum(backward_s) - inside_s
    queues.compute(0.0, after=queues.sent)
    update_s = _update_s(work, rates)
    queues.compute(update_s)
    if work.publish_bytes:
        arrives = queues.send(passes.gather.seconds(work.publish_bytes, work.ranks, work.buckets))
        queues.compute(0.0, after=arrives)
    return StepTime(
        total_s=queues.computed,
        compute_s=compute_s,
        messages_s=queues.messages + work.micro_batches * inside_s,
        exposed_s=max(0.0, queues.computed - compute_s - update_s),
        update_s=update_s,
        axes=work.axes(rates, queues.messages),
    )


def _update_s(work: Workload, rates: Rates) -> float:
    """Duration of the update. What it reads from a disk, computes and writes overlaps: the slowest of them counts."""
    moved_s = max(
        work.optimizer_bytes / rates.memory_bytes_per_s,
        work.disk_read_bytes / rates.disk_read_bytes_per_s
        + work.disk_write_bytes / rates.disk_write_bytes_per_s,
        work.host_copy_bytes / rates.device_host_bytes_per_s,
    )
    return moved_s + rates.update_s + (rates.shared_update_s if work.shares_state else 0.0)


class _Passes:
    """Forwards and backwards of a workload."""

    def __init__(self, work: Workload, rates: Rates) -> None:
        self.gather, self.reduce = rates.links(work.ranks * work.stride)
        self._work, self._rates = work, rates
        self._numel = max(sum(unit.numel for unit in work.units), 1)
        inside = [one.seconds(rates) for one in work.inside]
        self._inside = sum(forward for forward, _ in inside), sum(backward for _, backward in inside)

    def forward_s(self) -> list[float]:
        """Duration of each unit in a forward, in order."""
        rates = self._rates
        return _durations(
            [u.forward_flops for u in self._work.units],
            rates.forward_flops_per_s,
            rates.forward_pass_s + self._inside[0],
        )

    def backward_s(self) -> list[float]:
        """Duration of each unit in a backward, in order."""
        work, rates = self._work, self._rates
        backwards = list(reversed(work.units))
        memory = work.accumulate_bytes / rates.memory_bytes_per_s
        durations = _durations(
            [u.backward_flops for u in backwards],
            rates.backward_flops_per_s,
            rates.backward_pass_s + self._inside[1],
        )
        return [s + memory * u.numel / self._numel for s, u in zip(durations, backwards, strict=True)]

    def run(
        self,
        queues: _Queues,
        units: Sequence[Unit],
        seconds: Sequence[float],
        gathered_bytes: float,
        reduces: bool,
    ) -> None:
        """Computes units in order. Each is gathered while the one before it computes."""
        work, waiting, bucket_numel = self._work, 0, self._numel / self._work.buckets
        arrives = queues.send(self._gather_s(units[0], gathered_bytes)) if gathered_bytes else 0.0
        for number, (unit, duration) in enumerate(zip(units, seconds, strict=True)):
            queues.compute(0.0, after=arrives)
            if gathered_bytes:
                queues.compute(self._rates.gather_unit_s)
            if gathered_bytes and number + 1 < len(units):
                arrives = queues.send(self._gather_s(units[number + 1], gathered_bytes))
            queues.compute(duration)
            waiting += unit.numel
            last = number + 1 == len(units)
            while reduces and waiting and (waiting >= bucket_numel or last):
                part = min(waiting, bucket_numel)
                queues.send(self.reduce.seconds(work.reduce_bytes * part / self._numel, work.ranks))
                waiting = 0 if waiting <= bucket_numel else int(waiting - bucket_numel)

    def _gather_s(self, unit: Unit, all_bytes: float) -> float:
        if not all_bytes or not unit.numel:
            return 0.0
        return self.gather.seconds(all_bytes * unit.numel / self._numel, self._work.ranks)


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
