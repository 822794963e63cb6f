"""Implements the engine's protocols for an optimizer that averages gradients inside of its step, such as 1-bit Adam."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_engine.config import ConfigError
from ds_engine.interfaces import ClipsGradients, GradientNorms, LossGuard, ReducesGradients
from ds_engine.job import Job
from ds_zero import LossScaleError
from ds_zero.runtime.gradients.loss_scaler import DynamicScale, ScaleState


@runtime_checkable
class HasModelParts(Protocol):
    """An optimizer that reduces gradients, and can share norms with the ranks that hold the rest of the model."""

    def share_norms(self, model_group: Any) -> None:
        """Sets the process group of these ranks; None: there are none."""


def reduces(optimizer: Optimizer) -> bool:
    """Whether the optimizer averages gradients over ranks inside of its step."""
    return isinstance(optimizer, ReducesGradients) and optimizer.reduces_gradients


def check_reduction(job: Job, optimizer: Optimizer) -> None:
    """Raises for settings that are incompatible with an optimizer that averages gradients by itself.

    Raises:
        ConfigError: lists all incompatible settings.
    """
    if not reduces(optimizer):
        return
    name = type(optimizer).__name__
    wrong = []
    if job.stage > 0:
        wrong.append(f"zero_optimization.stage is {job.stage}: {_why_no_stage(name)}")
    if job.placement.optimizer_states != "device":
        wrong.append(
            f"zero_optimization.offload_optimizer: {name} compresses what it sends on the device of the model; remove "
            "the section"
        )
    if job.settings.communication_data_type is not None:
        wrong.append(
            f"communication_data_type is {job.settings.communication_data_type!r}: {name} reduces gradients by itself; "
            "remove it, and set optimizer.params.reduce_dtype"
        )
    scaling = job.precision.loss_scaling
    if not isinstance(optimizer, ClipsGradients):
        if math.isfinite(job.clipping):
            wrong.append(
                f"gradient_clipping is {job.clipping:g}: {name} averages gradients inside of its step, so the global "
                "norm is unknown before; set it to 0"
            )
        if scaling is not None and (scaling.dynamic or scaling.initial != 1.0):
            wrong.append(f"fp16.enabled: {name} steps with gradients that carry the loss scale; use bf16")
    if wrong:
        raise ConfigError(wrong)


def _why_no_stage(name: str) -> str:
    if name.startswith("Sharded"):
        return f"{name} divides masters and states among the ranks itself; set it to 0"
    divided = "ShardedOneBitLamb" if name.endswith("Lamb") else "ShardedOneBitAdam"
    return (
        f"{name} averages whole gradients, and every rank needs the whole momentum; set it to 0. The optimizer "
        f"{divided} divides masters and states among the ranks itself"
    )


@dataclass(frozen=True, kw_only=True)
class StepNorm:
    """`Norm` of one step."""

    before: float
    after: float


class StepNorms:
    """`GradientNorms` of an optimizer that measures and clips the gradient inside of its step."""

    def __init__(self, optimizer: ClipsGradients) -> None:
        self._optimizer = optimizer

    def clip(self, max_norm: float) -> None:
        self._optimizer.max_grad_norm = max_norm if math.isfinite(max_norm) else 0.0

    def last(self) -> StepNorm | None:
        report = self._optimizer.report
        if report is None:
            return None
        return StepNorm(before=report.grad_norm, after=report.grad_norm * report.clip_factor)


class NoNorms:
    """`GradientNorms` of an optimizer that does not report the norm: it can be neither limited nor measured."""

    def clip(self, max_norm: float) -> None:
        assert math.isinf(max_norm), "see check_reduction"

    def last(self) -> None:
        return None


class StepGuard:
    """`LossGuard` of an optimizer that unscales gradients inside of its step, and skips the step on all ranks if one of
    them has a gradient that is not finite.
    """

    culprit: str | None = None

    def __init__(self, optimizer: ClipsGradients, scale: float | DynamicScale) -> None:
        assert isinstance(optimizer, Optimizer)
        self._optimizer = optimizer
        self._counting = ScaleState.of(scale)
        self._warned = False
        self.step_was_skipped = False
        self.skipped_steps = 0
        optimizer.grad_scale = self._counting.scale
        optimizer.register_step_post_hook(self._stepped)

    @property
    def loss_scale(self) -> float:
        return self._counting.scale

    def scale(self, loss: Tensor) -> Tensor:
        if self._counting.policy is None and self._counting.scale == 1.0:
            return loss
        wide = loss if loss.dtype == torch.float64 else loss.float()
        return wide * self._counting.scale

    def state_dict(self) -> dict[str, Any]:
        return {**self._counting.saved(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        if not state_dict:  # saved by a job without loss scaling
            return
        self.skipped_steps = int(state_dict["skipped_steps"])
        self._counting.restore(state_dict)
        self._optimizer.grad_scale = self._counting.scale

    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        """After every step: changes the scale."""
        report = self._optimizer.report
        assert report is not None
        self.step_was_skipped = report.skipped
        if report.skipped:
            self.skipped_steps += 1
            if self._counting.at_minimum:
                self._at_minimum()
        self._counting.update(report.skipped)
        self._optimizer.grad_scale = self._counting.scale

    def _at_minimum(self) -> None:
        advice = (
            f"the loss scale is {self.loss_scale:g}, its minimum, and the gradient of a rank is still not finite. "
            "Either training diverges (try a lower learning rate, and check the data of this step), or the gradients "
            'do not fit into fp16: train in bf16, "bf16": {"enabled": true}'
        )
        policy = self._counting.policy
        if policy is None or policy.raise_at_min:
            raise LossScaleError(advice)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{advice}. Such steps are skipped (reported once)", stacklevel=4)


def norms_of(optimizer: Optimizer) -> GradientNorms:
    """Returns the `GradientNorms` of an optimizer for which `reduces` is true."""
    return StepNorms(optimizer) if isinstance(optimizer, ClipsGradients) else NoNorms()


def guard_of(optimizer: Optimizer, scale: float | DynamicScale | None) -> LossGuard | None:
    """Returns the `LossGuard` of an optimizer for which `reduces` is true; None if it has none.

    Args:
        scale: the loss scale; None: losses are not scaled.
    """
    if not isinstance(optimizer, ClipsGradients):
        return None
    return StepGuard(optimizer, 1.0 if scale is None else scale)


def residuals_of(optimizer: Optimizer) -> Mapping[str, Any] | None:
    """Returns what this rank has to save besides the states of its parameters; None: nothing."""
    own = getattr(optimizer, "residuals", None)
    if own is None or not reduces(optimizer):
        return None
    if not getattr(optimizer, "synchronised", True):
        raise ValueError(
            f"{type(optimizer).__name__}: ranks step alone at the moment and have different parameters, so there is no "
            "state for all of them: save after a step where engine.optimizer.synchronised is True"
        )
    residuals: Mapping[str, Any] | None = own()
    return residuals


def load_residuals(optimizer: Optimizer, states: Sequence[Mapping[str, Any]]) -> None:
    """Restores the results of `residuals_of`: of this rank if as many ranks have saved them, else of all ranks."""
    load = getattr(optimizer, "load_residuals", None)
    if load is not None and reduces(optimizer):
        load(states)
