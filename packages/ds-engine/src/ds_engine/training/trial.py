"""A trial of the autotuner: a training that ends by itself after some measured steps, and says what it has measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_engine.device import free_bytes, peak_bytes, synchronize
from ds_engine.files import write_whole
from ds_engine.interfaces import World
from ds_engine.job import Job

if TYPE_CHECKING:
    from torch import nn


class Trial:
    """Measures the optimizer steps from `start_profile_step` to `end_profile_step`. After them rank 0 writes the result
    to `metric_path`, and every rank ends with code 0: the script's own loop would go on for hours.
    """

    def __init__(
        self, job: Job, world: World, params_numel: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        section = job.settings.autotuning
        assert section.metric_path is not None
        self._job, self._world, self._numel, self._clock = job, world, params_numel, clock
        self._path = Path(section.metric_path)
        self._first, self._last = section.start_profile_step, section.end_profile_step
        self._done = 0
        self._began = clock()

    @classmethod
    def of(cls, job: Job, world: World, model: nn.Module) -> Trial | None:
        """The trial if the section `autotuning` asks for one."""
        section = job.settings.autotuning
        if not section.enabled or section.metric_path is None:
            return None
        return cls(job, world, sum(p.numel() for p in model.parameters()))

    def end_step(self) -> None:
        """A step has ended.

        Raises:
            SystemExit: with code 0, after the last measured step.
        """
        self._done += 1
        if self._done == self._first - 1:
            synchronize(self._world.device)
            self._began = self._clock()
        if self._done == self._last:
            synchronize(self._world.device)
            step_s = (self._clock() - self._began) / (self._last - self._first + 1)
            if self._world.rank == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, (json.dumps(self._result(step_s), indent=1) + "\n").encode())
            raise SystemExit(0)

    def _result(self, step_s: float) -> dict[str, Any]:
        device = self._world.device
        return {
            "throughput": self._job.batch.train / step_s,
            "latency": step_s,
            "memory_bytes": peak_bytes(device),
            "free_bytes": free_bytes(device, self._world.local_size),
            "params_numel": self._numel,
            "ran": what_ran(self._job, self._world),
        }


def what_ran(job: Job, world: World) -> dict[str, Any]:
    """The settings that are really in effect, which a trial reports."""
    return {
        "stage": job.stage,
        "train_micro_batch_size_per_gpu": job.batch.micro,
        "gradient_accumulation_steps": job.batch.steps,
        "train_batch_size": job.batch.train,
        "ranks": world.world_size,
        "optimizer_states": job.placement.optimizer_states,
        "precision": str(job.precision),
    }
