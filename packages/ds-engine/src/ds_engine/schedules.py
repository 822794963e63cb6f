"""Learning-rate schedules that move once per optimizer step.

The values are pure functions of the step index t (0 at the second optimizer step: the first one runs before
the schedule has moved, with the lowest rate), the same as those of the schedules of that name in DeepSpeed,
so that a config gives the same training.

Why not `torch.optim.lr_scheduler.LRScheduler`: it wraps `optimizer.step` (an attribute on a foreign object),
and counts calls to warn about an order that the engine gets right by construction.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

from ds_engine.config.errors import ConfigError
from ds_engine.config.suggest import did_you_mean

Rates = float | Sequence[float]


class LRSchedule(Protocol):
    """What the engine asks of a schedule: torch's own names, so that any of torch's is one."""

    def step(self) -> None: ...
    def get_last_lr(self) -> Sequence[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def warmup_ratio(t: int, num_steps: int, kind: str) -> float:
    """Share of the way from the lowest to the highest rate at step t < num_steps: log(t + 1) /
    log(num_steps), or t / num_steps.
    """
    return math.log(t + 1) / math.log(num_steps) if kind == "log" else t / num_steps


class Schedule:
    """Sets `lr` of every parameter group to a function of the step index."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    def rates(self, t: int) -> list[float]:
        """Learning rate of each group at step index `t`; -1 is before the first move."""
        raise NotImplementedError

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move to the next step, or to the given one."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def get_lr(self) -> list[float]:
        return self.rates(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.last_batch_iteration = int(state_dict["last_batch_iteration"])
        self._apply()

    def _apply(self) -> None:
        self._last_lr = self.rates(self.last_batch_iteration)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class WarmupLR(Schedule):
    """Rise from `warmup_min_lr` to `warmup_max_lr` (default: each group's own rate) over `warmup_num_steps`,
    then stay.
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
        self.num_steps = _warmup_steps(warmup_num_steps)
        self.kind = _warmup_type(warmup_type)
        self.min_lrs = self._per_group(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = (
            self._last_lr if warmup_max_lr is None else self._per_group(warmup_max_lr, "warmup_max_lr")
        )
        self._apply()

    def rates(self, t: int) -> list[float]:
        share = 0.0 if t < 0 else self.share(t)
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def share(self, t: int) -> float:
        """Of the way from the lowest to the highest rate, at step index t >= 0."""
        return warmup_ratio(t, self.num_steps, self.kind) if t < self.num_steps else 1.0

    def _per_group(self, value: Rates, name: str) -> list[float]:
        num_groups = len(self.optimizer.param_groups)
        if not isinstance(value, Sequence):
            return [float(value)] * num_groups
        if len(value) != num_groups:
            raise ValueError(
                f"{name} has {len(value)} rates, the optimizer has {num_groups} groups: give one number, or "
                "one for each"
            )
        return [float(v) for v in value]


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then fall in a straight line to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _total_steps(total_num_steps, warmup_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def share(self, t: int) -> float:
        if t < self.num_steps:
            return super().share(t)
        return max(0.0, (self.total_num_steps - t) / max(1.0, self.total_num_steps - self.num_steps))


class WarmupCosineLR(Schedule):
    """Rise from `warmup_min_ratio` to 1 of each group's own rate, then follow half a cosine down to
    `cos_min_ratio` of it.
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
        self.num_steps = _warmup_steps(warmup_num_steps)
        self.kind = _warmup_type(warmup_type)
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.base_lrs = self._last_lr
        self._apply()

    def rates(self, t: int) -> list[float]:
        ratio = 0.0 if t < 0 else self.ratio(t)
        return [lr * ratio for lr in self.base_lrs]

    def ratio(self, t: int) -> float:
        """Of each group's own rate, at step index t >= 0."""
        if t < self.num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * warmup_ratio(
                t, self.num_steps, self.kind
            )
        # The first step after warm-up is already one step down, and the end is never passed: a longer run
        # stays at the floor.
        done = min(1.0, (t - self.num_steps + 1) / max(1, self.total_num_steps - self.num_steps))
        return max(
            0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * done)) / 2.0
        )


def _warmup_steps(num_steps: int) -> int:
    """At least 2, because log(1) is 0."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"warmup_num_steps is {num_steps!r}: give a whole number of at least 1")
    return max(2, num_steps)


def _warmup_type(kind: str) -> str:
    if kind not in ("log", "linear"):
        raise ValueError(f'warmup_type is {kind!r}: give "log" or "linear"')
    return kind


def _total_steps(total: int, warmup: int) -> int:
    if not isinstance(total, int) or total < 1:
        raise ValueError(f"total_num_steps is {total!r}: give a whole number of at least 1")
    if total < warmup:
        warnings.warn(
            f"total_num_steps {total} is less than warmup_num_steps {warmup}: the run ends before the rate "
            "has risen to its full value",
            stacklevel=4,
        )
    return total


OWN: Mapping[str, Callable[..., Schedule]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}


def build(name: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRSchedule:
    """The schedule of a config's `scheduler` section.

    Raises:
        ConfigError: no schedule of that name, an argument it does not have, or a value that it refuses.
    """
    found = _find(name)
    accepted = [p for p in inspect.signature(found).parameters if p not in ("self", "optimizer")]
    wrong = [
        f"scheduler.params.{key}: {found.__name__} has no such argument.{did_you_mean(key, accepted)}"
        for key in params
        if key not in accepted
    ]
    if wrong:
        raise ConfigError(wrong)
    try:
        schedule: LRSchedule = found(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"scheduler.params for {found.__name__}: {error}"]) from error
    return schedule


def _find(name: str) -> Any:
    own = {key.lower(): value for key, value in OWN.items()}
    if name.lower() in own:
        return own[name.lower()]
    # torch's live here: only looked through when ours do not match.
    from torch.optim import lr_scheduler

    # ReduceLROnPlateau's step wants a metric, which the engine does not have.
    theirs = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not key.startswith("_")
        if key not in ("LRScheduler", "ReduceLROnPlateau")
    }
    for key, value in theirs.items():
        if key.lower() == name.lower():
            return value
    raise ConfigError(
        [f'scheduler.type is "{name}": there is no such schedule.{did_you_mean(name, [*OWN, *theirs])}']
    )
