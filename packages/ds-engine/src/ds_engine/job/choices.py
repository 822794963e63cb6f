"""What the settings and the arguments of `initialize` choose, before ranks and model are known."""

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

Where = Literal["device", "cpu"]
"""On the device that computes, or in host memory."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each kind of state rests between steps."""

    params: Where = "device"
    """Parameters in the dtype in which they compute."""
    gradients: Where = "device"
    """Reduced gradients."""
    masters: Where = "device"
    """fp32 values that the optimizer updates."""
    optimizer_states: Where = "device"

    @classmethod
    def of(cls, settings: DsConfig) -> Placement:
        if settings.zero_optimization.offload_optimizer.device == "cpu":
            return cls(gradients="cpu", masters="cpu", optimizer_states="cpu")
        return cls()

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the update runs in host memory."""
        return self.optimizer_states == "cpu"


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """The optimizer of a job: which one, and with which settings."""

    name: str
    """As the configuration spells it, or the class of what was passed; "function" for a function that makes one."""
    passed: bool = False
    """Whether it was passed to `initialize`; then everything below is the passed object's own affair."""
    steps_on_host: bool = False
    """Whether what was passed runs in host memory."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The section's `params`."""
    on_host: bool = False
    """Build the version that runs in host memory."""
    state_dtype: torch.dtype | None = None
    """Dtype of its states; None: the optimizer's own."""


@dataclass(frozen=True, kw_only=True)
class ScheduleChoice:
    """The learning-rate schedule of a job."""

    name: str
    """As the configuration spells it, or the class of what was passed."""
    passed: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that is chosen without looking at ranks or model; what `ds_engine.rules` checks."""

    settings: DsConfig
    """Where the choices come from; sections that no field below covers are read from here."""
    stage: int
    """Of ZeRO, 0 to 3."""
    placement: Placement
    optimizer: OptimizerChoice | None
    """None: neither named nor passed."""
    schedule: ScheduleChoice | None
    """None: a constant rate."""
    device_type: str
    """Type of the device that computes: "cpu", "cuda", ..."""
    clipping: float
    """Largest global norm of a gradient; inf: norms are measured, and gradients stay as they are."""


def training_device() -> str:
    """Type of the device that `initialize` will choose: that of the process group, else this machine's."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def choices_of(
    settings: DsConfig,
    optimizer: object = None,
    lr_scheduler: object = None,
    device_type: str | None = None,
) -> Choices:
    """Read the choices.

    Args:
        optimizer: what was passed to `initialize`: an optimizer, a class, a function, or None.
        lr_scheduler: what was passed to `initialize`, or None.
        device_type: what computes; None: see `training_device`.
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
