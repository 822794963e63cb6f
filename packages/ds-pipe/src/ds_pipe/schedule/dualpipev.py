"""DualPipeV: forwards and backwards of two micro-batches side by side, on two stages in a V (DeepSeek-AI 2025)."""

from __future__ import annotations

from collections import deque

from ds_pipe.actions import Action, Op, backward, backward_input, backward_weight, forward, overlap
from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.placement import v_shaped
from ds_pipe.schedule.schedule import Schedule


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: in its main phase a rank always pairs a forward with a backward of its other stage, so that the
    communication inside of one (expert parallelism) runs while the other computes.

    Raises:
        ScheduleError: fewer micro-batches than twice the number of ranks.
    """
    if num_microbatches < 2 * num_ranks:
        raise ScheduleError(
            f"dualpipev on {num_ranks} ranks needs at least {2 * num_ranks} micro-batches, got {num_microbatches}"
        )
    return Schedule(
        name="dualpipev",
        num_microbatches=num_microbatches,
        rank_of_stage=v_shaped(num_ranks),
        actions=tuple(tuple(_row(rank, num_ranks, num_microbatches)) for rank in range(num_ranks)),
    )


def _row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """The phases of one rank. Ranks before the turn of the V run more forwards ahead, and finish later."""
    work = _Work((rank, 2 * num_ranks - 1 - rank))
    after = num_ranks - rank - 1  # ranks between this one and the turn
    for _ in range(2 * after):
        work.forward(0)
    for _ in range(rank + 1):
        work.forward(0)
        work.forward(1)
    for _ in range(after):
        work.backward(1, split=True)
        work.weight()
        work.forward(1)
    for i in range(num_microbatches - 2 * num_ranks + rank + 1):
        if i == 0 and after == 0:
            # At the turn, this backward needs the forward that has just run: there is nothing to run beside it yet.
            work.forward(0)
            work.backward(1)
        else:
            work.pair(0, 1)
        work.pair(1, 0)
    for _ in range(after):
        work.backward(1)
        work.pair(1, 0)
    # From the middle of this phase on, backwards are split: what is left for the weights fills the end.
    whole = rank + 1
    for i in range(2 * (rank + 1)):
        work.backward(1 - i % 2, split=i >= whole)
    for _ in range(after):
        work.weight()
        work.backward(0, split=True)
    while work.weights:
        work.weight()
    return work.actions


class _Work:
    """Appends actions, counting micro-batches."""

    def __init__(self, stages: tuple[int, int]) -> None:
        self.actions: list[Action] = []
        self.weights: deque[Action] = deque()
        self._stages = stages
        self._next = {(op, chunk): 0 for op in (Op.FORWARD, Op.BACKWARD) for chunk in (0, 1)}

    def _count(self, op: Op, chunk: int) -> tuple[int, int]:
        m = self._next[op, chunk]
        self._next[op, chunk] += 1
        return self._stages[chunk], m

    def forward(self, chunk: int) -> None:
        self.actions.append(forward(*self._count(Op.FORWARD, chunk)))

    def backward(self, chunk: int, *, split: bool = False) -> None:
        stage, m = self._count(Op.BACKWARD, chunk)
        self.actions.append(backward_input(stage, m) if split else backward(stage, m))
        if split:
            self.weights.append(backward_weight(stage, m))

    def weight(self) -> None:
        self.actions.append(self.weights.popleft())

    def pair(self, forward_chunk: int, backward_chunk: int) -> None:
        self.actions.append(
            overlap(
                forward(*self._count(Op.FORWARD, forward_chunk)),
                backward(*self._count(Op.BACKWARD, backward_chunk)),
            )
        )
