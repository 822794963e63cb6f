"""The time of a step of a job, predicted from its plan and the rates of the machine."""

from ds_engine.build.step_time.work import ModelWork, work_of, workload

__all__ = ["ModelWork", "work_of", "workload"]
