"""Runs the stages of a rank as a schedule says."""

from ds_pipe.executor.executor import Executor, StepResult
from ds_pipe.executor.group_transport import GroupTransport
from ds_pipe.executor.memory_transport import MemoryHub, MemoryTransport
from ds_pipe.executor.stage import Stage, StageOptions

__all__ = [
    "Executor",
    "GroupTransport",
    "MemoryHub",
    "MemoryTransport",
    "Stage",
    "StageOptions",
    "StepResult",
]
