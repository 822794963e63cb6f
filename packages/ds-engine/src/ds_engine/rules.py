"""Which settings do not go together: one row each, with the reason. Every row has a test in
tests/engine/test_rules.py.

A pair that does not compose is added here, never as an `if` in the engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ds_engine import schedules
from ds_engine.build import optimizer as optimizer_section
from ds_engine.config.load import auto
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


HOST_OPTIMIZERS = ("adam", "adamw", "cpuadam")


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
        second="an optimizer without a host version",
        applies=lambda job: (
            job.offloads and job.optimizer is None and job.optimizer_name not in ("", *HOST_OPTIMIZERS)
        ),
        reason="only Adam and AdamW have a host version so far",
        remedy='set optimizer.type to "AdamW", or offload_optimizer.device to "none"',
    ),
    Rule(
        first="offload_optimizer.device cpu",
        second="optimizer.params.torch_adam",
        applies=lambda job: (
            job.offloads
            and job.optimizer is None
            and job.config.optimizer is not None
            and job.config.optimizer.params.get("torch_adam") is True
        ),
        reason="torch's Adam would step on the device of the model, where the states then are not",
        remedy="remove torch_adam",
    ),
    Rule(
        first="offload_optimizer.device cpu",
        second="an optimizer object that was passed in",
        applies=lambda job: job.offloads and job.optimizer is not None and not job.host_optimizer,
        reason="the object would step on the device of the model, where the states then are not",
        remedy="pass a ds_offload.CPUAdam, or name the optimizer in the config instead",
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
        first="zero_optimization.offload_optimizer.pin_memory false",
        second="offload_optimizer.device cpu",
        applies=lambda job: job.offloads and not job.config.zero_optimization.offload_optimizer.pin_memory,
        reason="host memory is page-locked beside an accelerator and ordinary elsewhere, whatever this says",
        remedy="remove it",
        refuse=False,
    ),
)


def check(job: Job, *, autos_may_stay: bool = False) -> None:
    """Refuse, or warn about, settings that do not go together, and "auto" where it has to be a value.

    Args:
        autos_may_stay: something will still fill them in.

    Raises:
        ConfigError: with everything that is wrong.
    """
    broken = [rule for rule in RULES if rule.applies(job)]
    refused = [rule for rule in broken if rule.refuse]
    problems = [] if autos_may_stay else list(auto.unfilled(job.config))
    problems += _named(job)
    problems += [f"{r.first} and {r.second} do not go together: {r.reason}; {r.remedy}" for r in refused]
    if problems:
        raise ConfigError(problems, job.config.origin.where)
    for rule in broken:
        warnings.warn(
            f"{rule.first} has no effect with {rule.second}: {rule.reason}; {rule.remedy}", stacklevel=3
        )


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
