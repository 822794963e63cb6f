"""A timeline as rectangles: what every drawing has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_pipe.actions import Op
from ds_pipe.simulate.results import Span

Colour = tuple[int, int, int]

_COLOURS: Mapping[Op, Colour] = {
    Op.FORWARD: (66, 133, 204),
    Op.BACKWARD: (46, 139, 122),
    Op.BACKWARD_INPUT: (61, 165, 145),
    Op.BACKWARD_WEIGHT: (150, 178, 78),
    Op.UNSHARD: (180, 180, 190),
    Op.REDUCE_GRAD: (200, 150, 90),
}

LEGEND: Mapping[str, Colour] = {
    "forward": _COLOURS[Op.FORWARD],
    "backward": _COLOURS[Op.BACKWARD],
    "backward, input": _COLOURS[Op.BACKWARD_INPUT],
    "backward, weights": _COLOURS[Op.BACKWARD_WEIGHT],
    "gather": _COLOURS[Op.UNSHARD],
    "reduce": _COLOURS[Op.REDUCE_GRAD],
}


@dataclass(frozen=True, kw_only=True)
class Box:
    """One rectangle of a timeline, in units of the whole width."""

    rank: int
    left: float
    width: float
    computes: bool
    colour: Colour
    label: str
    """Index of the micro-batch, or nothing."""
    title: str
    """What it is, in full."""


def boxes(spans: Sequence[Span], unit: str) -> Iterator[Box]:
    """Returns the rectangles of a run.

    Args:
        spans: what ran.
        unit: the unit of its times, for titles.
    """
    begin = min((s.start for s in spans), default=0.0)
    whole = max((s.end for s in spans), default=1.0) - begin or 1.0
    for span in spans:
        action = span.action
        yield Box(
            rank=span.rank,
            left=(span.start - begin) / whole,
            width=(span.end - span.start) / whole,
            computes=action.op.computes,
            colour=_shade(_COLOURS[action.op], action.stage, spans, span.rank),
            label="" if action.microbatch is None else str(action.microbatch),
            title=(
                f"{action} on rank {span.rank}, step {span.step}: {span.start:.6g} to {span.end:.6g} {unit}"
            ),
        )


def _shade(colour: Colour, stage: int, spans: Sequence[Span], rank: int) -> Colour:
    """Later stages of a rank are lighter."""
    stages = sorted({s.action.stage for s in spans if s.rank == rank})
    share = 0.45 * stages.index(stage) / max(1, len(stages) - 1)
    red, green, blue = (round(c + (255 - c) * share) for c in colour)
    return red, green, blue
