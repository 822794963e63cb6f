"""Which settings do not go together: one row each, with the reason. Every row has a test in
tests/engine/test_rules.py.

A pair that does not compose is added here, never as an `if` in the engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ds_engine import schedules
from ds_engine.build import optimizer as optimizer_section
from ds_engine.config.load import auto, loader, source
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.support.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the rules look at."""

    config: DsConfig
    optimizer: str | None = None
    """Class name of the optimizer that was passed to `initialize`; None if the config names it."""
    host_optimizer: bool = False
    """The passed optimizer runs on the host (it is ds_offload's)."""
    scheduler_passed: bool = False
    device: str = field(default_factory=lambda: training_device())
    """Type of the device that the model is on while it trains."""

    @property
    def optimizer_name(self) -> str:
        """In lower case; empty when there is none."""
        named = self.config.optimizer.type if self.config.optimizer is not None else ""
        return (self.optimizer or named).lower()

    @property
    def stage(self) -> int:
        return self.config.zero_optimization.stage

    @property
    def offloads(self) -> bool:
        return self.config.zero_optimization.offload_optimizer.device != "none"

    @property
    def offloads_params(self) -> bool:
        return self.config.zero_optimization.offload_param.device != "none"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Two settings that do not compose."""

    first: str
    second: str
    applies: Callable[[Job], bool]
    reason: str
    remedy: str
    refuse: bool = True
    """False: the job runs, but one of the two has no effect, which is said as a warning."""


RULES: tuple[Rule, ...] = (
    Rule(
        first="bf16.bf16_optimizer_states",
        second="an optimizer object that was passed in",
        applies=lambda job: (
            job.config.bf16.enabled and job.config.bf16.bf16_optimizer_states and job.optimizer is not None
        ),
        reason="the object makes its own states",
        remedy="name the optimizer in the config, or give the object state_dtype=torch.bfloat16 and remove it",
    ),
    Rule(
        first="optimizer LBFGS",
        second="engine.step()",
        applies=lambda job: job.optimizer_name == "lbfgs",
        reason="it evaluates the model again inside its step, through a closure",
        remedy="use an optimizer without closure, for example AdamW",
    ),
    Rule(
        first="optimizer SparseAdam",
        second="dense gradient buckets",
        applies=lambda job: job.optimizer_name == "sparseadam",
        reason="it accepts sparse gradients only, and gradients are reduced in dense buckets",
        remedy="use AdamW, and sparse=False in nn.Embedding",
    ),
    Rule(
        first="offload_optimizer.device cpu",
        second="an optimizer object that was passed in",
        applies=lambda job: (
            job.offloads
            and job.optimizer is not None
            and not job.host_optimizer
            and job.config.zero_force_ds_cpu_optimizer
        ),
        reason="masters and states rest in host memory, and an optimizer that was not made for it is slow there",
        remedy="pass a ds_offload.CPUAdam, name the optimizer in the config instead, or set "
        "zero_force_ds_cpu_optimizer to false",
    ),
    Rule(
        first="an optimizer object that was passed in",
        second="the section optimizer",
        applies=lambda job: job.optimizer is not None and job.config.optimizer is not None,
        reason="there can be one optimizer, and nothing says which of the two is meant",
        remedy="remove one of them",
    ),
    Rule(
        first="a scheduler object that was passed in",
        second="the section scheduler",
        applies=lambda job: job.scheduler_passed and job.config.scheduler is not None,
        reason="there can be one schedule, and nothing says which of the two is meant",
        remedy="remove one of them",
    ),
    Rule(
        first="zero_optimization.offload_param",
        second="a stage below 3",
        applies=lambda job: job.offloads_params and job.stage < 3,
        reason="below stage 3, parameters are whole on every rank and stay with the model",
        remedy="remove the section, or set zero_optimization.stage to 3",
        refuse=False,
    ),
    Rule(
        first="zero_optimization.offload_param.device cpu",
        second="a model on the CPU",
        applies=lambda job: job.offloads_params and job.stage == 3 and job.device == "cpu",
        reason="parameters are in host memory already",
        remedy="remove the section",
        refuse=False,
    ),
    Rule(
        first="zero_optimization.offload_param.device cpu",
        second="a model on an accelerator",
        applies=lambda job: job.offloads_params and job.stage == 3 and job.device != "cpu",
        reason="ds-offload will keep parameters in host memory, and this version does not yet",
        remedy='set zero_optimization.offload_param.device to "none"; offload_optimizer works',
    ),
    Rule(
        first="zero_optimization.offload_optimizer.pin_memory false",
        second="offload_optimizer.device cpu",
        applies=lambda job: job.offloads and not job.config.zero_optimization.offload_optimizer.pin_memory,
        reason="host memory is page-locked beside an accelerator and ordinary elsewhere, whatever this says",
        remedy="remove it",
        refuse=False,
    ),
)


def load(
    config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig,
    job_of: Callable[[DsConfig], Job],
    *,
    autos_may_stay: bool = False,
) -> DsConfig:
    """Read and check a configuration together with the job that it is for; arguments as for `config.load` and `check`.

    Raises:
        ConfigError: with everything that is wrong in either.
    """
    if isinstance(config, DsConfig):
        check(job_of(config), autos_may_stay=autos_may_stay)
        return config
    examined = loader.examine(source.open_source(config))
    job = job_of(examined.config) if examined.config is not None else None
    more = mistakes(job, autos_may_stay=autos_may_stay) if job is not None else []
    settings = loader.accept(examined, more)
    if job is not None:
        _warn(job)
    return settings


def check(job: Job, *, autos_may_stay: bool = False) -> None:
    """Refuse, or warn about, settings that do not go together, and "auto" where it has to be a value.

    Args:
        autos_may_stay: something will still fill them in.

    Raises:
        ConfigError: with everything that is wrong.
    """
    problems = mistakes(job, autos_may_stay=autos_may_stay)
    if problems:
        raise ConfigError(problems, job.config.origin.where)
    _warn(job)


def mistakes(job: Job, *, autos_may_stay: bool = False) -> list[str]:
    """A sentence for each mistake that `check` would raise."""
    refused = [rule for rule in RULES if rule.refuse and rule.applies(job)]
    problems = [] if autos_may_stay else list(auto.unfilled(job.config))
    problems += _named(job)
    return problems + [
        f"{r.first} and {r.second} do not go together: {r.reason}; {r.remedy}" for r in refused
    ]


def _warn(job: Job) -> None:
    """Settings that have no effect in this job, on the rank that speaks for all."""
    for rule in RULES:
        if not rule.refuse and rule.applies(job):
            warnings.warn(
                f"{rule.first} has no effect with {rule.second}: {rule.reason}; {rule.remedy}", stacklevel=4
            )


def training_device() -> str:
    """Type of the device that `initialize` will choose: that of the process group, else this machine's."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def _named(job: Job) -> list[str]:
    """What is wrong with the names in the sections optimizer and scheduler, where those are built."""
    config, found = job.config, []
    if config.optimizer is not None and job.optimizer is None:
        section = config.optimizer
        found += optimizer_section.check(section.type, section.params, on_host=job.offloads)
    if config.scheduler is not None and not job.scheduler_passed:
        # What "auto" stands for is missing on purpose, and told by `auto.unfilled`.
        left = {path.rpartition(".")[2] for path in config.origin.autos}
        problems = schedules.check(config.scheduler.type, config.scheduler.params)
        found += [
            p for p in problems if not any(p.startswith(f"scheduler.params.{n} is missing") for n in left)
        ]
    return found
