"""One cycle of learning rate and momentum, then decay."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch.optim import Optimizer

from ds_engine.schedules.base import Rates, Schedule

SECOND_BETA = 0.99
"""Value to which DeepSpeed's OneCycle sets Adam's second beta, while it changes the first."""


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The shape of a cycle, in optimizer steps."""

    first: float
    """Number of steps of the rise."""
    second: float
    """Number of steps of the fall."""
    first_stairs: int = 0
    """Number of stairs of the rise; 0: a straight line."""
    second_stairs: int = 0

    @property
    def total(self) -> float:
        return self.first + self.second

    def height(self, t: int) -> float:
        """Returns the position between the lowest (0) and the highest (1) learning rate at step index t."""
        at = (t + 1) % self.total
        rising = at <= self.first
        done, length = (at, self.first) if rising else (self.total - at, self.second)
        stairs = self.first_stairs if rising else self.second_stairs
        # Multiply first: rounding to just below 1 would lose the highest stair.
        return math.floor(done * stairs / length) / stairs if stairs > 0 else done / length


class OneCycle(Schedule):
    """The learning rate rises from `cycle_min_lr` to `cycle_max_lr` and falls back, while the first of `betas`
    changes in the opposite direction. Then the learning rate decays: min / (1 + decay_lr_rate x steps /
    decay_step_size).

    Source: Smith, A disciplined approach to neural network hyper-parameters (2018).

    Args:
        optimizer: the optimizer whose groups are changed.
        cycle_min_lr: lowest learning rate, for all groups or for each.
        cycle_max_lr: highest learning rate, for all groups or for each.
        decay_lr_rate: rate of the decay after the cycle; 0: no decay.
        cycle_first_step_size: number of steps of the rise.
        cycle_second_step_size: number of steps of the fall. Default: as the rise.
        cycle_first_stair_count: number of stairs of the rise; 0: a straight line.
        cycle_second_stair_count: number of stairs of the fall. Default: as the rise.
        decay_step_size: number of steps of one unit of decay; 0: no decay.
        cycle_momentum: change the first of `betas`, too. Warns if the optimizer has no betas.
        cycle_min_mom: lowest momentum, at the highest learning rate.
        cycle_max_mom: highest momentum, at the lowest learning rate.
        decay_mom_rate: rate of the growth of the momentum after the cycle.
        last_batch_iteration: initial step index.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: Rates,
        cycle_max_lr: Rates,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Rates = 0.8,
        cycle_max_mom: Rates = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        if cycle_first_step_size <= 0 or second < 0:
            raise ValueError(
                f"cycle_first_step_size is {cycle_first_step_size} and cycle_second_step_size {second}: the "
                "first must be more than 0, the second at least 0"
            )
        stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.cycle = Cycle(
            first=cycle_first_step_size,
            second=second,
            first_stairs=cycle_first_stair_count,
            second_stairs=stairs,
        )
        self.min_lrs = self._per_group(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._per_group(cycle_max_lr, "cycle_max_lr")
        self.decay_step_size = decay_step_size
        self.decay_lr_rate = decay_lr_rate
        self.decay_mom_rate = decay_mom_rate
        self.cycle_momentum = cycle_momentum and _has_betas(optimizer)
        if self.cycle_momentum:
            self.min_moms = self._per_group(cycle_min_mom, "cycle_min_mom")
            self.max_moms = self._per_group(cycle_max_mom, "cycle_max_mom")
        self._apply()

    def rates(self, t: int) -> list[float]:
        if t < self.cycle.total:
            height = self.cycle.height(t)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        fall = 1.0 + self.decay_lr_rate * self._decayed(t)
        return [low / fall for low in self.min_lrs]

    def momenta(self, t: int) -> list[float]:
        """Returns the first of `betas` of each group at step index t."""
        if t < self.cycle.total:
            height = self.cycle.height(t)
            return [
                high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)
            ]
        growth = 1.0 + self.decay_mom_rate * self._decayed(t)
        return [high * growth for high in self.max_moms]

    @property
    def total_size(self) -> float:
        """Number of steps of the whole cycle."""
        return self.cycle.total

    @property
    def step_ratio(self) -> float:
        """Fraction of the cycle that is the rise."""
        return self.cycle.first / self.cycle.total

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Returns `betas` of each group; None if momentum is not changed."""
        if not self.cycle_momentum:
            return None
        return [(first, SECOND_BETA) for first in self.momenta(self.last_batch_iteration)]

    def _decayed(self, t: int) -> float:
        """Returns the units of decay since the end of the cycle."""
        return (t - self.cycle.total + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _apply(self) -> None:
        super()._apply()
        betas = self.get_mom() or []
        if betas and self.last_batch_iteration < 0:
            # The first step of DeepSpeed's cycle has the lowest momentum, though get_mom() says the highest.
            betas = [(lowest, SECOND_BETA) for lowest in self.min_moms]
        for group, pair in zip(self.optimizer.param_groups, betas, strict=False):
            group["betas"] = pair


def _has_betas(optimizer: Optimizer) -> bool:
    if "betas" in optimizer.defaults:
        return True
    warnings.warn(
        f"OneCycle: cycle_momentum has no effect, because {type(optimizer).__name__} has no betas",
        stacklevel=3,
    )
    return False
