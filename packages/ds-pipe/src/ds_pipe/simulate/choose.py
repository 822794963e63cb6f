"""Chooses the schedule with the shortest step for given costs and a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.names import TRAINING, make, stages_per_rank
from ds_pipe.schedule.schedule import Schedule
from ds_pipe.simulate.costs import Costs
from ds_pipe.simulate.results import Simulation
from ds_pipe.simulate.simulator import simulate


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One schedule with its simulation."""

    name: str
    """Name for `ds_pipe.make`."""
    simulation: Simulation
    """Its simulation."""
    fits: bool
    """Whether it needs no more than the limit of memory."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of `choose`."""

    candidates: tuple[Candidate, ...]
    """All candidates: those that fit by the time of a step, then the others by memory."""
    left_out: tuple[str, ...]
    """Schedules that these numbers do not allow, with the reason."""

    @property
    def best(self) -> Schedule:
        """The chosen schedule.

        Raises:
            ScheduleError: none fits.
        """
        first = self.candidates[0]
        if not first.fits:
            raise ScheduleError(
                f"no schedule fits: {first.name} needs least memory, {first.simulation.peak_bytes} bytes on its "
                "fullest rank; use more ranks, smaller micro-batches or activation checkpointing"
            )
        return first.simulation.schedule


def choose(
    costs: Costs,
    num_ranks: int,
    num_microbatches: int,
    *,
    memory_limit_bytes: int | None = None,
    names: Sequence[str] = TRAINING,
    steps: int = 4,
) -> Choice:
    """Simulates all schedules and orders them.

    Args:
        costs: measured costs of the finest division of the model. Its number of stages is `num_ranks` or a multiple;
            consecutive stages are joined for schedules with fewer stages.
        num_ranks: number of pipeline ranks.
        num_microbatches: number of micro-batches in one step.
        memory_limit_bytes: what a rank may use for resident bytes and activations. None: no limit.
        names: schedules to choose from.
        steps: number of simulated steps; what counts is the time of a step when steps follow each other.

    Raises:
        ValueError: the number of stages is no multiple of the number of ranks.
    """
    if len(costs.stages) % num_ranks:
        raise ValueError(f"{len(costs.stages)} stages cannot be divided evenly among {num_ranks} ranks")
    limit = float("inf") if memory_limit_bytes is None else memory_limit_bytes
    found: list[Candidate] = []
    left_out: list[str] = []
    for name in names:
        per_rank = stages_per_rank(name)
        if len(costs.stages) % (num_ranks * per_rank):
            left_out.append(
                f"{name}: needs {per_rank} stages on each of {num_ranks} ranks, costs are given for {len(costs.stages)}"
            )
            continue
        joined = costs.merged(num_ranks * per_rank)
        try:
            schedules = list(_variants(name, num_ranks, num_microbatches, joined, memory_limit_bytes))
        except ScheduleError as error:
            left_out.append(f"{name}: {error}")
            continue
        for schedule in schedules:
            simulation = simulate(schedule, joined, steps=steps)
            found.append(
                Candidate(name=schedule.name, simulation=simulation, fits=simulation.peak_bytes <= limit)
            )
    # Of equally fast schedules, the one with less memory, then the earlier, simpler one.
    order = sorted(
        found,
        key=lambda c: (
            not c.fits,
            round(c.simulation.step_s, 12) if c.fits else 0.0,
            c.simulation.peak_bytes,
        ),
    )
    return Choice(candidates=tuple(order), left_out=tuple(left_out))


def _variants(
    name: str, num_ranks: int, num_microbatches: int, costs: Costs, limit: int | None
) -> Iterator[Schedule]:
    """The schedule of this name; with a limit, ZB-V with fewer activations too."""
    times = [(s.forward_s, s.backward_input_s, s.backward_weight_s) for s in costs.stages]
    fitted = times if name.startswith("zb-") else None
    yield make(name, num_ranks, num_microbatches, times=fitted)
    if name == "zb-v" and limit is not None:
        for kept in sorted({2, num_ranks, (3 * num_ranks + 1) // 2} - {2 * num_ranks}):
            yield make(name, num_ranks, num_microbatches, times=fitted, max_activations=max(2, kept))
