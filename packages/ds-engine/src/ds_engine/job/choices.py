"""The choices that follow from the settings and the arguments of `initialize` alone, without ranks and model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from ds_engine.config.sections.model import DsConfig

Where = Literal["device", "cpu", "nvme"]
"""On the training device, in host memory, or on a disk."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each kind of state is stored between steps."""

    params: Where = "device"
    """Parameters in their compute dtype."""
    gradients: Where = "device"
    """Reduced gradients."""
    masters: Where = "device"
    """fp32 masters, which the optimizer updates."""
    optimizer_states: Where = "device"
    ratio: float = 1.0
    """Fraction of the elements whose gradients, masters and states are not on the device, if any are not."""
    params_in_cpu: int = 0
    """Number of elements of the parameters that stay in host memory if parameters are stored on a disk."""
    by_budget: bool = False
    """Whether each tensor is placed by a planner, from the sizes of the model, within `offload.budget`. The other
    fields then say where tensors are as far as they are not on the device and not on a disk."""

    @classmethod
    def of(cls, settings: DsConfig) -> Placement:
        zero = settings.zero_optimization
        step: Where = _where(zero.offload_optimizer.device)
        params: Where = _where(zero.offload_param.device) if zero.stage == 3 else "device"
        if settings.offload.budget is not None:
            params = "cpu" if zero.stage == 3 else "device"
            return cls(params=params, gradients="cpu", masters="cpu", optimizer_states="cpu", by_budget=True)
        return cls(
            params=params,
            gradients=step,
            masters=step,
            optimizer_states=step,
            ratio=zero.offload_optimizer.ratio if step != "device" else 1.0,
            params_in_cpu=zero.offload_param.max_in_cpu if params == "nvme" else 0,
        )

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the update runs in host memory."""
        return self.optimizer_states != "device"

    def on(self, where: Where) -> frozenset[str]:
        """Returns the kinds of tensors of ds_zero's stores that are stored at `where`."""
        kinds = {
            "param": self.params,
            "grad": self.gradients,
            "master": self.masters,
            "state": self.optimizer_states,
        }
        return frozenset(kind for kind, place in kinds.items() if place == where)


def _where(device: Literal["none", "cpu", "nvme"]) -> Where:
    return "device" if device == "none" else device


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """The optimizer of a job, and its settings."""

    name: str
    """Name in the configuration, or the class of the passed object; "function" for a function that makes one."""
    passed: bool = False
    """Whether it was passed to `initialize`. Then the fields below have their defaults."""
    steps_on_host: bool = False
    """Whether the passed object steps in host memory."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """`params` of the section."""
    on_host: bool = False
    """Whether to build the class that steps in host memory."""
    state_dtype: torch.dtype | None = None
    """Dtype of its states; None: the default of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class ScheduleChoice:
    """The learning-rate schedule of a job."""

    name: str
    """Name in the configuration, or the class of the passed object."""
    passed: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PipelineChoice:
    """The division of a model into the stages of a pipeline."""

    num_stages: int
    """Number of pipeline ranks."""
    schedule: str
    """Name of the schedule."""
    parts: tuple[int, ...]
    """Index of the first layer of each stage, and the number of layers."""
    rank_of_stage: tuple[int, ...]
    """Pipeline rank of each stage."""
    ties: bool
    """Whether several ranks have the same weight."""

    def __str__(self) -> str:
        bounds = zip(self.parts, self.parts[1:], strict=False)
        layers = " | ".join(f"{start}-{end - 1}" if end > start else "none" for start, end in bounds)
        whole = " (backwards are not split: ds-zero reduces after whole ones)" if self.splits else ""
        return f"{self.num_stages} ranks, schedule {self.schedule}{whole}, layers {layers}"

    @property
    def splits(self) -> bool:
        """Whether the schedule computes backwards for inputs and for weights apart, if nothing prevents it."""
        return self.schedule.startswith("zb") or self.schedule == "dualpipev"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """All choices that do not depend on ranks or model. `ds_engine.rules` checks them."""

    settings: DsConfig
    """The configuration. Sections without a field below are read from it."""
    stage: int
    """ZeRO stage, 0 to 3."""
    placement: Placement
    optimizer: OptimizerChoice | None
    """None: neither configured nor passed."""
    schedule: ScheduleChoice | None
    """None: a constant rate."""
    device_type: str
    """Type of the training device: "cpu", "cuda", ..."""
    clipping: float
    """Maximum global norm of the gradient; inf: the norm is measured, but not limited."""
    pipeline: PipelineChoice | None = None
    """None: the model is not a pipeline."""

    @property
    def quantized_weights(self) -> bool:
        """Whether parameters are sent as int8 when they are gathered."""
        return self.stage == 3 and self.settings.zero_optimization.zero_quantized_weights

    @property
    def quantized_gradients(self) -> bool:
        """Whether gradients are sent as int4 when they are reduced."""
        return self.stage > 0 and self.settings.zero_optimization.zero_quantized_gradients

    @property
    def quantized_frozen(self) -> bool:
        """Whether frozen parameters are kept and gathered as int8."""
        return self.stage == 3 and self.settings.zero_optimization.zero_quantized_nontrainable_weights

    @property
    def quantized(self) -> bool:
        """Whether anything is sent in fewer bits."""
        return self.quantized_weights or self.quantized_gradients or self.quantized_frozen


def training_device() -> str:
    """Returns the type of the device that `initialize` will choose: that of the process group, else that of this
    machine.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def choices_of(
    settings: DsConfig,
    optimizer: object = None,
    lr_scheduler: object = None,
    device_type: str | None = None,
    pipeline: PipelineChoice | None = None,
) -> Choices:
    """Makes the choices.

    Args:
        optimizer: the argument of `initialize`: an optimizer, a class, a function, or None.
        lr_scheduler: the argument of `initialize`, or None.
        device_type: type of the training device; None: see `training_device`.
        pipeline: the stages of a model that is a pipeline.
    """
    placement = Placement.of(settings)
    return Choices(
        settings=settings,
        stage=settings.zero_optimization.stage,
        placement=placement,
        optimizer=_optimizer(settings, placement, optimizer),
        schedule=_schedule(settings, lr_scheduler),
        device_type=device_type or training_device(),
        clipping=settings.gradient_clipping if settings.gradient_clipping > 0 else math.inf,
        pipeline=pipeline,
    )


def _optimizer(settings: DsConfig, placement: Placement, given: object) -> OptimizerChoice | None:
    if given is not None:
        kind = type(given) if isinstance(given, Optimizer) else given if inspect.isclass(given) else None
        if kind is None:
            return OptimizerChoice(name="function", passed=True)
        homes = {base.__module__.partition(".")[0] for base in kind.__mro__}
        return OptimizerChoice(name=kind.__name__, passed=True, steps_on_host="ds_offload" in homes)
    section = settings.optimizer
    if section is None:
        return None
    half = settings.bf16.enabled and settings.bf16.bf16_optimizer_states
    return OptimizerChoice(
        name=section.type,
        params=section.params,
        on_host=placement.optimizer_on_host,
        state_dtype=torch.bfloat16 if half else None,
    )


def _schedule(settings: DsConfig, given: object) -> ScheduleChoice | None:
    if given is not None:
        kind = given if inspect.isclass(given) or inspect.isfunction(given) else type(given)
        return ScheduleChoice(name=kind.__name__, passed=True)
    section = settings.scheduler
    return None if section is None else ScheduleChoice(name=section.type, params=section.params)
