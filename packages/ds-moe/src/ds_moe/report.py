"""What the layers of a model have seen: load of every expert, drops, entropy, messages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.dispatch.exchange import Traffic
from ds_moe.routing.losses import load
from ds_moe.routing.selection import Routing


@dataclass
class LayerCounters:
    """Sums over the forwards of one layer in training on this rank, since `clear`."""

    traffic: Traffic = field(default_factory=Traffic)
    forwards: int = 0
    tokens: int = 0
    counts: Tensor | None = None
    """(E,) int64 on the device: tokens that chose each expert; None before the first forward."""
    kept: Tensor | None = None
    """() int64 on the device: assignments that were not dropped."""
    entropy: Tensor | None = None
    """() fp32 on the device: sum over tokens, in nats."""

    def add(self, routing: Routing) -> None:
        """Counts one forward, without waiting for the device."""
        self.forwards += 1
        self.tokens += routing.experts.shape[0]
        kept = routing.counts.sum() if routing.kept is None else routing.kept.sum()
        self.counts = routing.counts if self.counts is None else self.counts + routing.counts
        self.kept = kept if self.kept is None else self.kept + kept
        self.entropy = routing.entropy if self.entropy is None else self.entropy + routing.entropy

    def add_choices(self, experts: Tensor, num_experts: int) -> None:
        """Counts one forward of which only the chosen experts (T, K) are known: nothing was dropped."""
        counts = load(experts, num_experts)
        unknown = torch.full((), float("nan"), device=experts.device)
        self.add(Routing(experts, experts, None, counts, unknown, unknown))

    def clear(self) -> None:
        """Begins to count anew."""
        self.traffic.clear()
        self.forwards = self.tokens = 0
        self.counts = self.kept = self.entropy = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one layer has seen since the last report."""

    name: str
    """Name of the layer in the model."""
    tokens: int
    """Tokens that went through the layer, on the ranks of the report."""
    load: tuple[int, ...]
    """For each expert, the number of tokens that chose it, before any was dropped."""
    dropped: int
    """Assignments of tokens to experts that were dropped."""
    entropy: float
    """Mean entropy of the router's probabilities of a token, in nats; log(E) if all experts are equally likely. NaN for
    converted experts, which do not see the probabilities."""
    sent_bytes: int
    """Bytes of rows that were sent to other ranks, summed over the ranks of the report."""
    waiting_s: float
    """Longest time that one of the ranks waited for rows, in seconds."""

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert divided by the mean load; 1 if all are equal, or if there were no tokens."""
        total = sum(self.load)
        return max(self.load) * len(self.load) / total if total else 1.0

    def __str__(self) -> str:
        """One line for people."""
        share = self.dropped / max(sum(self.load), 1)
        return (
            f"{self.name}: {self.tokens} tokens, busiest expert {self.imbalance:.2f} x the mean, {share:.1%} dropped, "
            f"entropy {self.entropy:.2f}, {self.sent_bytes / 1e6:.1f} MB sent, waited {self.waiting_s:.3f} s"
        )


def summed(
    name: str,
    counters: LayerCounters,
    num_experts: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> LayerReport:
    """Returns the sums over the ranks of `group` (None: of this process). Collective."""
    counts = counters.counts if counters.counts is not None else torch.zeros(num_experts)
    others = [
        float(counters.tokens),
        float(counters.kept if counters.kept is not None else 0),
        float(counters.entropy if counters.entropy is not None else 0),
        float(counters.traffic.sent_bytes),
    ]
    # fp64 holds every integer below 2^53.
    sums = torch.cat([torch.tensor(others, dtype=torch.float64), counts.to("cpu", torch.float64)]).to(device)
    waiting = torch.tensor([counters.traffic.waiting_s], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX, group=group)
    tokens, kept, entropy, sent, *load = sums.tolist()
    return LayerReport(
        name=name,
        tokens=int(tokens),
        load=tuple(int(count) for count in load),
        dropped=int(sum(load) - kept),
        entropy=entropy / max(tokens, 1.0),
        sent_bytes=int(sent),
        waiting_s=waiting.item(),
    )
