"""What a simulated or measured run of a schedule looked like."""

from __future__ import annotations

from dataclasses import dataclass

from ds_pipe.actions import Action
from ds_pipe.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Span:
    """One action of one rank, with its time."""

    rank: int
    """The rank."""
    step: int
    """Index of the step."""
    action: Action
    """What ran."""
    start: float
    """Seconds from the start of the run."""
    end: float
    """Seconds from the start of the run."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The result of `simulate`."""

    schedule: Schedule
    """The schedule."""
    steps: int
    """Number of steps."""
    spans: tuple[Span, ...]
    """All computations, gathers and reductions, rank by rank in order."""
    peak_activations: tuple[int, ...]
    """For every rank the largest number of micro-batches of one stage whose activations were kept at the same time."""
    peak_activation_bytes: tuple[int, ...]
    """For every rank their bytes."""
    resident_bytes: tuple[int, ...]
    """For every rank the bytes of its parameters, gradients and optimizer states."""
    sent_bytes: tuple[int, ...]
    """For every rank the bytes that it sent to other pipeline ranks."""

    @property
    def total_s(self) -> float:
        """Seconds until the last rank is done."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def step_s(self) -> float:
        """Seconds of one step: of several steps, from the end of the first to the end of the last, divided by their
        number; this leaves out that the first step fills the pipeline.
        """
        if self.steps == 1:
            return self.total_s
        first = max(span.end for span in self.spans if span.step == 0)
        return (self.total_s - first) / (self.steps - 1)

    @property
    def bubble(self) -> float:
        """Share of a step in which ranks do not compute, on average."""
        busy = sum(span.end - span.start for span in self.spans if span.action.op.computes) / self.steps
        return 1.0 - busy / (self.schedule.num_ranks * self.step_s)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the rank that needs most: resident ones and activations."""
        return max(a + b for a, b in zip(self.resident_bytes, self.peak_activation_bytes, strict=True))
