"""Schedules with a warm-up."""

from __future__ import annotations

import math
import warnings

from torch.optim import Optimizer

from ds_engine.schedules.base import Rates, Schedule


def warmup_ratio(t: int, num_steps: int, kind: str) -> float:
    """Returns the position between the lowest (0) and the highest (1) learning rate at step t < num_steps: log(t + 1)
    / log(num_steps), or t / num_steps.
    """
    return math.log(t + 1) / math.log(num_steps) if kind == "log" else t / num_steps


class WarmupLR(Schedule):
    """The learning rate rises from `warmup_min_lr` to `warmup_max_lr` (default: that of each group) in
    `warmup_num_steps` steps, then stays constant.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.warmup_num_steps = _warmup_steps(warmup_num_steps)
        self.warmup_type = _warmup_type(warmup_type)
        self.min_lrs = self._per_group(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = (
            self._last_lr if warmup_max_lr is None else self._per_group(warmup_max_lr, "warmup_max_lr")
        )
        self._apply()

    def rates(self, t: int) -> list[float]:
        share = 0.0 if t < 0 else self.share(t)
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def share(self, t: int) -> float:
        """Returns the position between the lowest (0) and the highest (1) learning rate at step index t >= 0."""
        return warmup_ratio(t, self.warmup_num_steps, self.warmup_type) if t < self.warmup_num_steps else 1.0


class WarmupDecayLR(WarmupLR):
    """As WarmupLR; then the learning rate falls linearly to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _total_steps(total_num_steps, warmup_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def share(self, t: int) -> float:
        if t < self.warmup_num_steps:
            return super().share(t)
        return max(0.0, (self.total_num_steps - t) / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """The learning rate rises from `warmup_min_ratio` times that of each group to the whole, then follows half a
    cosine down to `cos_min_ratio` times it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = _total_steps(total_num_steps, warmup_num_steps)
        self.warmup_num_steps = _warmup_steps(warmup_num_steps)
        self.warmup_type = _warmup_type(warmup_type)
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.base_lrs = self._last_lr
        self._apply()

    def get_lr_ratio(self) -> float:
        """Returns the current factor of each group's learning rate."""
        return 0.0 if self.last_batch_iteration < 0 else self.ratio(self.last_batch_iteration)

    def rates(self, t: int) -> list[float]:
        ratio = 0.0 if t < 0 else self.ratio(t)
        return [lr * ratio for lr in self.base_lrs]

    def ratio(self, t: int) -> float:
        """Returns the factor of each group's learning rate at step index t >= 0."""
        if t < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * warmup_ratio(
                t, self.warmup_num_steps, self.warmup_type
            )
        # The first step after warm-up is already below the maximum. After the end the rate stays at its minimum.
        done = min(
            1.0, (t - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps)
        )
        return max(
            0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * done)) / 2.0
        )


def _warmup_steps(num_steps: int) -> int:
    """Returns at least 2, because log(1) is 0."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"warmup_num_steps is {num_steps!r}: it must be an integer of at least 1")
    return max(2, num_steps)


def _warmup_type(kind: str) -> str:
    if kind not in ("log", "linear"):
        raise ValueError(f'warmup_type is {kind!r}: it must be "log" or "linear"')
    return kind


def _total_steps(total: int, warmup: int) -> int:
    if not isinstance(total, int) or total < 1:
        raise ValueError(f"total_num_steps is {total!r}: it must be an integer of at least 1")
    if total < warmup:
        warnings.warn(
            f"total_num_steps {total} is less than warmup_num_steps {warmup}: the run ends before the rate "
            "has risen to its full value",
            stacklevel=4,
        )
    return total
