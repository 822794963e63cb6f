"""Learning-rate schedules that are stepped once per optimizer step.

The values are pure functions of the step index t (0 at the second optimizer step: the first one runs before
the schedule has moved, with the lowest rate), the same as those of the schedules of that name in DeepSpeed,
so that a config gives the same training.

Why not `torch.optim.lr_scheduler.LRScheduler`: it wraps `optimizer.step` (an attribute on a foreign object),
and counts calls to warn about an order that the engine gets right by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

Rates = float | Sequence[float]


class LRSchedule(Protocol):
    """The protocol of a schedule, with torch's names, so that any schedule of torch implements it."""

    def step(self) -> None: ...
    def get_last_lr(self) -> Sequence[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Schedule:
    """Sets `lr` of every parameter group to a function of the step index."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    def rates(self, t: int) -> list[float]:
        """Returns the learning rate of each group at step index `t`; -1 is before the first step."""
        raise NotImplementedError

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Moves to the next step, or to the given one."""
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
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # the tensor of a capturable optimizer must stay the same object
            else:
                group["lr"] = lr

    def _per_group(self, value: Rates, name: str) -> list[float]:
        num_groups = len(self.optimizer.param_groups)
        if not isinstance(value, Sequence):
            return [float(value)] * num_groups
        if len(value) != num_groups:
            raise ValueError(
                f"{name} has {len(value)} values, the optimizer has {num_groups} groups: pass one number, or one "
                "for each group"
            )
        return [float(v) for v in value]
