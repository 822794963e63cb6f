"""A schedule: for every rank, the actions that it runs in one step, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_pipe.actions import Action, Op, computations
from ds_pipe.errors import ScheduleError

_HEADER = "# ds_pipe schedule"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The actions of all ranks for one step, as a value."""

    name: str
    """Name of the algorithm."""
    num_microbatches: int
    """Number of micro-batches in one step."""
    rank_of_stage: tuple[int, ...]
    """For every stage the pipeline rank that runs it."""
    actions: tuple[tuple[Action, ...], ...]
    """For every rank its actions, in order."""

    @property
    def num_stages(self) -> int:
        """Number of parts into which the model is divided."""
        return len(self.rank_of_stage)

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @property
    def communicates(self) -> bool:
        """Whether sends and receives are written out."""
        return any(a.op.sends or a.op.receives for row in self.actions for a in row)

    @property
    def trains(self) -> bool:
        """Whether it has backwards."""
        return any(a.op is not Op.FORWARD for row in self.actions for a in computations(row))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages that a rank runs, in ascending order."""
        return tuple(s for s, r in enumerate(self.rank_of_stage) if r == rank)

    def __str__(self) -> str:
        """One line for each rank, below a line with the properties. `parse` reads it."""
        ranks = " ".join(map(str, self.rank_of_stage))
        header = f"{_HEADER}: {self.name}; micro-batches {self.num_microbatches}; rank of stage {ranks}"
        return "\n".join([header, *(",".join(map(str, row)) for row in self.actions)]) + "\n"

    @classmethod
    def parse(cls, text: str, *, name: str = "custom") -> Schedule:
        """Reads the text form, or the CSV form of `torch.distributed.pipelining` (one line for each rank, no header;
        empty cells are steps in which a rank is idle).

        Args:
            text: the text.
            name: the name of a schedule without header.

        Raises:
            ScheduleError: the text is no schedule, or the schedule is incomplete.
        """
        lines = text.strip("\n").split("\n")
        rank_of_stage: tuple[int, ...] | None = None
        if lines[0].startswith(_HEADER):
            fields = [field.strip() for field in lines.pop(0).removeprefix(f"{_HEADER}:").split(";")]
            if len(fields) != 3 or not fields[2].startswith("rank of stage "):
                raise ScheduleError(f"the first line is no header of a schedule: {';'.join(fields)!r}")
            name = fields[0]
            rank_of_stage = tuple(int(word) for word in fields[2].removeprefix("rank of stage ").split())
        rows = tuple(tuple(map(Action.parse, filter(str.strip, _cells(line)))) for line in lines)
        count = 1 + max((a.microbatch or 0 for row in rows for a in computations(row)), default=-1)
        found = rank_of_stage or _rank_of_stage(rows)
        schedule = cls(name=name, num_microbatches=count, rank_of_stage=found, actions=rows)
        check(schedule)
        return schedule


def _cells(line: str) -> list[str]:
    return line.replace('"', "").split(",")


def _rank_of_stage(rows: Sequence[tuple[Action, ...]]) -> tuple[int, ...]:
    rank_of = {a.stage: rank for rank, row in enumerate(rows) for a in computations(row)}
    missing = [s for s in range(max(rank_of, default=-1) + 1) if s not in rank_of]
    if missing or not rank_of:
        raise ScheduleError(f"no rank computes stage {missing[0] if missing else 0}")
    return tuple(rank_of[s] for s in range(len(rank_of)))


def check(schedule: Schedule) -> None:
    """Checks that every rank computes all its stages for all micro-batches, each once and in a possible order.

    Whether ranks wait for each other forever is checked by `ds_pipe.simulate`.

    Raises:
        ScheduleError: names rank and action.
    """
    trains = schedule.trains
    for rank, row in enumerate(schedule.actions):
        seen: set[Action] = set()
        for action in row:
            for leaf in action.leaves():
                _check_action(schedule, rank, leaf, seen)
                seen.add(leaf)
        for stage in schedule.stages_of(rank):
            for m in range(schedule.num_microbatches):
                _check_complete(rank, stage, m, seen, trains)


def _check_action(schedule: Schedule, rank: int, action: Action, seen: set[Action]) -> None:
    stage, m = action.stage, action.microbatch
    if not 0 <= stage < schedule.num_stages or schedule.rank_of_stage[stage] != rank:
        raise ScheduleError(f"rank {rank} runs {action}, but stage {stage} is not on this rank")
    if m is not None and m >= schedule.num_microbatches:
        raise ScheduleError(f"rank {rank} runs {action}: there are {schedule.num_microbatches} micro-batches")
    if action in seen and m is not None:
        raise ScheduleError(f"rank {rank} runs {action} twice")
    before = {
        Op.BACKWARD: (Op.FORWARD,),
        Op.BACKWARD_INPUT: (Op.FORWARD,),
        Op.BACKWARD_WEIGHT: (Op.BACKWARD_INPUT,),
        Op.SEND_FORWARD: (Op.FORWARD,),
    }.get(action.op, ())
    for op in before:
        if Action(stage, op, m) not in seen:
            raise ScheduleError(f"rank {rank} runs {action} before {Action(stage, op, m)}")
    if action.op is Op.SEND_BACKWARD and not seen & {
        Action(stage, op, m) for op in (Op.BACKWARD, Op.BACKWARD_INPUT)
    }:
        raise ScheduleError(f"rank {rank} runs {action} before the backward of stage {stage}")


def _check_complete(rank: int, stage: int, m: int, seen: set[Action], trains: bool) -> None:
    def has(op: Op) -> bool:
        return Action(stage, op, m) in seen

    if not has(Op.FORWARD):
        raise ScheduleError(f"rank {rank} never runs {stage}F{m}")
    whole, parts = has(Op.BACKWARD), (has(Op.BACKWARD_INPUT), has(Op.BACKWARD_WEIGHT))
    if trains and (whole == any(parts) or any(parts) != all(parts)):
        raise ScheduleError(
            f"rank {rank} has to run either {stage}B{m}, or both {stage}I{m} and {stage}W{m}, exactly once"
        )
