"""The learning-rate range test."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from ds_engine.schedules.base import Rates, Schedule


class LRRangeTest(Schedule):
    """The learning rate rises from `lr_range_test_min_lr` without limit, to find the largest rate with which the
    model trains.

    At step index t the rate is min x (1 + step_rate x (t + 1) / step_size), in stairs of step_size steps with
    `lr_range_test_staircase`. Source: Smith, A disciplined approach to neural network hyper-parameters (2018).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: Rates = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = self._per_group(lr_range_test_min_lr, "lr_range_test_min_lr")
        if not isinstance(lr_range_test_step_size, int) or lr_range_test_step_size < 1:
            raise ValueError(
                f"lr_range_test_step_size is {lr_range_test_step_size!r}: it must be an integer of at least 1"
            )
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._apply()

    def rates(self, t: int) -> list[float]:
        steps = (t + 1) / self.step_size
        growth = 1.0 + self.step_rate * (math.floor(steps) if self.staircase else steps)
        return [low * growth for low in self.min_lr]
