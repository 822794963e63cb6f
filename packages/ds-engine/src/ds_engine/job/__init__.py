"""The description of a job: one frozen value, resolved once, that all other modules read."""

from ds_engine.job.choices import (
    Choices,
    OptimizerChoice,
    PipelineChoice,
    Placement,
    ScheduleChoice,
    Where,
    choices_of,
)
from ds_engine.job.description import Accumulating, Job, describe
from ds_engine.job.precision import LossScaling, Precision
from ds_engine.job.topology import ALONE, AXES, Axis, Topology

__all__ = [
    "ALONE",
    "AXES",
    "Accumulating",
    "Axis",
    "Choices",
    "Job",
    "LossScaling",
    "OptimizerChoice",
    "PipelineChoice",
    "Placement",
    "Precision",
    "ScheduleChoice",
    "Topology",
    "Where",
    "choices_of",
    "describe",
]
