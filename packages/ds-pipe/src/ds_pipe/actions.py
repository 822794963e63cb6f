"""One action of a pipeline schedule, as a frozen value with a text form.

The text form is the one that `torch.distributed.pipelining` prints, so schedules can be exchanged with it: the stage,
the operation, the micro-batch.

    2F0                       stage 2 computes the forward of micro-batch 0
    2B0                       the whole backward
    2I0, 2W0                  backward in two parts: for the input, for the weights
    (0F3;7B1)OVERLAP_F_B      a forward and a backward side by side
    2SEND_F0, 3RECV_F0        activations from stage 2 to stage 3
    3SEND_B0, 2RECV_B0        their gradients, from stage 3 to stage 2
    2UNSHARD, 2RESHARD        parameters of a sharded stage are gathered, and dropped
    2REDUCE_GRAD              the gradients of a stage are reduced over data-parallel ranks
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ds_pipe.errors import ScheduleError


class Op(enum.Enum):
    """What an action does; the value is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    OVERLAP = "OVERLAP_F_B"
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"

    @property
    def computes(self) -> bool:
        """Whether a stage runs its forward or backward."""
        return self in (
            Op.FORWARD,
            Op.BACKWARD,
            Op.BACKWARD_INPUT,
            Op.BACKWARD_WEIGHT,
            Op.OVERLAP,
        )

    @property
    def sends(self) -> bool:
        """Whether it starts sending a message."""
        return self in (Op.SEND_FORWARD, Op.SEND_BACKWARD)

    @property
    def receives(self) -> bool:
        """Whether it starts receiving a message."""
        return self in (Op.RECV_FORWARD, Op.RECV_BACKWARD)

    @property
    def of_whole_stage(self) -> bool:
        """Whether it belongs to no micro-batch."""
        return self in (Op.UNSHARD, Op.RESHARD, Op.REDUCE_GRAD)


_SINGLE = re.compile(r"(\d+)([A-Z_]+)(\d*)")
_OVERLAP = re.compile(r"\((.*);(.*)\)OVERLAP_F_B")


@dataclass(frozen=True)
class Action:
    """One action of one rank. `str` gives its text form, `Action.parse` reads it."""

    stage: int
    """Index of the stage. Of an overlap: the stage of its first part."""
    op: Op
    microbatch: int | None = None
    """Index of the micro-batch; None for actions of the whole stage, and for overlaps."""
    parts: tuple[Action, ...] = ()
    """Of an overlap: the actions that run side by side."""

    def __post_init__(self) -> None:
        if (self.op is Op.OVERLAP) != bool(self.parts):
            raise ScheduleError(
                f"action {self.op.value} with {len(self.parts)} parts: only an overlap has parts"
            )
        needs_microbatch = self.op is not Op.OVERLAP and not self.op.of_whole_stage
        if needs_microbatch != (self.microbatch is not None):
            verb = "needs" if needs_microbatch else "has no"
            raise ScheduleError(f"action {self.op.value} of stage {self.stage} {verb} micro-batch")

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.op.value}"
        return f"{self.stage}{self.op.value}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads the text form.

        Raises:
            ScheduleError: the text is no action.
        """
        text = text.strip()
        pair = _OVERLAP.fullmatch(text)
        if pair is not None:
            return overlap(*(cls.parse(part) for part in pair.groups()))
        single = _SINGLE.fullmatch(text)
        ops = {op.value: op for op in Op}
        if single is None or single[2] not in ops:
            raise ScheduleError(f"{text!r} is no action; actions look like 2F0, 2B0, 2SEND_F0 or 2UNSHARD")
        return cls(int(single[1]), ops[single[2]], int(single[3]) if single[3] else None)

    def leaves(self) -> tuple[Action, ...]:
        """Returns the parts of an overlap, or the action itself."""
        return self.parts or (self,)


def forward(stage: int, microbatch: int) -> Action:
    """Returns the forward of a micro-batch."""
    return Action(stage, Op.FORWARD, microbatch)


def backward(stage: int, microbatch: int) -> Action:
    """Returns the whole backward of a micro-batch."""
    return Action(stage, Op.BACKWARD, microbatch)


def backward_input(stage: int, microbatch: int) -> Action:
    """Returns the part of backward that computes gradients of the stage's input."""
    return Action(stage, Op.BACKWARD_INPUT, microbatch)


def backward_weight(stage: int, microbatch: int) -> Action:
    """Returns the part of backward that computes gradients of the parameters."""
    return Action(stage, Op.BACKWARD_WEIGHT, microbatch)


def overlap(*parts: Action) -> Action:
    """Returns one action whose parts run side by side."""
    return Action(parts[0].stage, Op.OVERLAP, None, parts)


def computations(actions: tuple[Action, ...]) -> Iterator[Action]:
    """Iterates over forwards and backwards, those inside of overlaps included."""
    for action in actions:
        if action.op.computes:
            yield from action.leaves()
