"""Pipeline parallelism: schedules as values, a simulator that checks them, an executor that follows them."""

from ds_pipe.actions import Action, Op
from ds_pipe.errors import DeadlockError, PipelineError, ScheduleError
from ds_pipe.schedule import NAMES, Schedule, lower, make
from ds_pipe.simulate import Choice, Costs, Simulation, Span, StageCosts, choose, simulate

__version__ = "0.1.0"

__all__ = [
    "NAMES",
    "Action",
    "Choice",
    "Costs",
    "DeadlockError",
    "Op",
    "PipelineError",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Span",
    "StageCosts",
    "choose",
    "lower",
    "make",
    "simulate",
]
