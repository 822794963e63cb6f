"""A job: its choices, resolved for the ranks and the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_engine.config.support.batch import Batch
from ds_engine.job.choices import Choices
from ds_engine.job.precision import Precision
from ds_engine.job.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Accumulating:
    """How the gradients of the micro-batches of a step are accumulated."""

    plan: Literal["local", "sharded"]
    """"local": gradients are summed on each rank and reduced once; "sharded": each is reduced, shards are summed."""
    plan_is_default: bool
    managed: bool
    """True: the engine counts micro-batches. False: every `step()` updates."""
    rank_invariant: bool
    """Whether the order of sums is independent of the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Job(Choices):
    """One training job. `initialize`, `plan`, `verify` and the start-up summary all read this value."""

    topology: Topology
    batch: Batch
    accumulating: Accumulating
    precision: Precision

    def is_check_due(self, step: int) -> bool:
        """Whether replicated values are compared over the ranks before optimizer step number `step`."""
        interval = self.settings.integrity.replica_check_interval
        return interval > 0 and step % interval == 0


def describe(choices: Choices, topology: Topology, device_type: str) -> Job:
    """Resolves choices for a topology and a device.

    Raises:
        ConfigError: the batch sizes contradict each other on this number of ranks, or a class of modules does not
            exist.
    """
    settings = choices.settings
    return Job(
        settings=settings,
        stage=choices.stage,
        placement=choices.placement,
        optimizer=choices.optimizer,
        schedule=choices.schedule,
        clipping=choices.clipping,
        topology=topology,
        batch=settings.batch(topology.samples.size),
        accumulating=_accumulating(choices),
        precision=Precision.of(settings, device_type),
        device_type=device_type,
        pipeline=choices.pipeline,
    )


def _accumulating(choices: Choices) -> Accumulating:
    zero = choices.settings.zero_optimization
    default: Literal["local", "sharded"] = (
        "local" if choices.stage < 2 and not zero.rank_invariant else "sharded"
    )
    return Accumulating(
        plan=zero.accumulation_plan or default,
        plan_is_default=zero.accumulation_plan is None,
        managed=choices.settings.managed_gradient_accumulation,
        rank_invariant=zero.rank_invariant,
    )
