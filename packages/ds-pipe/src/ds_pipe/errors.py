"""The exceptions of ds_pipe. All survive pickling: they have no constructor of their own."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """A pipeline cannot run, or has stopped running. The message names rank, stage, micro-batch and action."""


class ScheduleError(ValueError):
    """A schedule is incomplete or contradicts itself."""


class DeadlockError(ScheduleError):
    """The ranks of a schedule wait for each other in a cycle, which the message prints."""
