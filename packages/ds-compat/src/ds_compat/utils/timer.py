"""`deepspeed.utils.timer.ThroughputTimer`: samples a second, counted from `start` and `stop` around micro-batches.

Unlike the original's, it does not wait for an accelerator: a wait in every forward would take away the overlap of
host and device. Over many steps the host follows the device, and the mean is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ds_compat.utils.logs import log_dist


def _say(line: str) -> None:
    log_dist(line, ranks=[0])


class ThroughputTimer:
    """Counts samples and seconds, without the first `start_step` steps.

    Args:
        batch_size: samples of a step, over all ranks.
        start_step: steps that are left out, as the first ones are slow.
        steps_per_output: steps between two lines; None or 0: no lines.
        logging_fn: what takes the lines; default the logger of rank 0.
    """

    def __init__(
        self,
        config: Any = None,
        batch_size: int | None = None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], Any] | None = None,
    ) -> None:
        self.enabled = bool(getattr(config, "enabled", True))
        self.batch_size = max(1, batch_size or 1)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn or _say
        self.initialized = self.started = False
        self.start_time = self.end_time = 0.0
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self.step_elapsed_time = 0.0
        """Seconds of the micro-batches of the step that runs."""

    def update_epoch_count(self) -> None:
        """An epoch is over: its micro-batches are counted from 0 again."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """A micro-batch begins."""
        if not self.enabled:
            return
        self.initialized = self.started = True
        if self._counts():
            self.start_time = time.time()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """A micro-batch is over; with `global_step`, a step is, too. No effect without `start`."""
        if not self.enabled or not self.started:
            return
        self.started = False
        counted = self._counts() and self.start_time > 0
        self.micro_step_count += 1
        self.global_step_count += global_step
        if not counted:
            return
        self.end_time = time.time()
        duration = self.end_time - self.start_time
        self.total_elapsed_time += duration
        self.step_elapsed_time += duration
        if global_step:
            if report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
                self._report()
            self.step_elapsed_time = 0.0

    def avg_samples_per_sec(self) -> float:
        """Samples a second over all counted steps; -inf before the first of them."""
        steps = self.global_step_count - self.start_step
        if steps <= 0 or self.total_elapsed_time <= 0:
            return float("-inf")
        return self.batch_size * steps / self.total_elapsed_time

    def _counts(self) -> bool:
        return self.global_step_count >= self.start_step

    def _report(self) -> None:
        now = self.batch_size / self.step_elapsed_time if self.step_elapsed_time > 0 else float("inf")
        self.logging(
            f"epoch {self.epoch_count}, micro-batch {self.micro_step_count}, step {self.global_step_count}: "
            f"{self.avg_samples_per_sec():.2f} samples/s in the mean, {now:.2f} samples/s in this step"
        )
