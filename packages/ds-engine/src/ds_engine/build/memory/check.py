"""Warns in `initialize` if the model's states will not fit into memory."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.memory.predict import predicted
from ds_engine.device import free_bytes
from ds_engine.interfaces import World
from ds_engine.job import Job, Placement, Where
from ds_engine.launch.machine import available_bytes, format_bytes

_MOST_PER_ELEMENT = 24
"""Upper bound of bytes per element for all stages, precisions and usual optimizers. A model that fits with it needs
no plan.
"""

_log = logging.getLogger("ds_engine")


@dataclass(frozen=True, kw_only=True)
class Room:
    """Free memory for one rank, in addition to the memory that its process uses already."""

    device_bytes: int
    """Free memory of the training device."""
    host_bytes: int
    """Free host memory; the same memory if the training device is the CPU."""

    @classmethod
    def of(cls, world: World) -> Room:
        """Returns the free memory of the device, and of the host (including cgroup limits) divided by the number of
        local ranks.
        """
        free = free_bytes(world.device, world.local_size)
        host = free if world.device.type == "cpu" else available_bytes() // world.local_size
        return cls(device_bytes=free, host_bytes=host)


def warn_if_too_large(job: Job, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Warns on rank 0 if parameters, gradients, masters and optimizer states alone do not fit.

    Takes no time if they obviously fit, and otherwise the time of a plan without activations, at most about a second.
    A model that cannot be planned is not checked.
    """
    if world.rank != 0:
        return
    room = Room.of(world)
    params, buffers = list(model.parameters()), list(model.buffers())
    most = _MOST_PER_ELEMENT * sum(p.numel() for p in params) + sum(b.nbytes for b in buffers)
    if most <= min(room.device_bytes, room.host_bytes):
        return
    # Memory that the process holds already is part of the plan.
    held = sum(t.nbytes for t in [*params, *buffers] if t.device.type == world.device.type)
    room = replace(room, device_bytes=room.device_bytes + held)
    wanted = _Choice(stage=job.stage, placement=job.placement)
    try:
        plan = predicted(job, model, optimizer)
        if _fits(plan, room, world):
            return
        others = [
            (other, predicted(job, model, optimizer, stage=other.stage, placement=other.placement))
            for other in wanted.further(world.device.type != "cpu")
        ]
    except ValueError as error:
        _log.debug("the memory cannot be planned: %s", error)
        return
    good = [(other, fitting) for other, fitting in others if _fits(fitting, room, world)]
    warnings.warn(_sentence(plan, good, room, world), stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Settings that determine the memory of states."""

    stage: int
    placement: Placement

    def further(self, offloads: bool) -> list[_Choice]:
        """Returns settings that need less device memory, the nearest first.

        Args:
            offloads: whether host memory is other memory than that of the device.
        """
        stages = [replace(self, stage=stage) for stage in range(self.stage + 1, 4)]
        now = self.placement.optimizer_states
        places: list[Where] = []
        if offloads and now == "device":
            places.append("cpu")
        if now != "nvme":
            places.append("nvme")
        moved = [Placement(gradients=place, masters=place, optimizer_states=place) for place in places]
        return stages + [replace(one, placement=place) for place in moved for one in (self, *stages)]

    def __str__(self) -> str:
        place = self.placement.optimizer_states
        return f"stage {self.stage}" + (
            f' with offload_optimizer.device "{place}"' if place != "device" else ""
        )


def _fits(plan: ds_zero.Plan, room: Room, world: World) -> bool:
    if plan.device_bytes > room.device_bytes:
        return False
    return world.device.type == "cpu" or plan.host_bytes <= room.host_bytes


def _sentence(plan: ds_zero.Plan, good: list[tuple[_Choice, ds_zero.Plan]], room: Room, world: World) -> str:
    on_cpu = world.device.type == "cpu"
    share = f", a {world.local_size}th of this machine's" if on_cpu and world.local_size > 1 else ""
    text = (
        f"parameters, gradients, masters and optimizer states of {plan.model} ({plan.params_numel:,} parameters, stage "
        f"{plan.stage}, {plan.ranks} rank{'s' * (plan.ranks != 1)}, {plan.optimizer}) take "
        f"{format_bytes(plan.device_bytes)} on every rank, without activations, but only "
        f"{format_bytes(room.device_bytes)} are free{share}"
    )
    if plan.host_bytes and not on_cpu:
        text += f"; {format_bytes(plan.host_bytes)} of host memory, but only {format_bytes(room.host_bytes)} are free"
    if not good:
        return f"{text}. No stage fits: use more machines; `ds plan` shows the memory in detail"
    told = "; ".join(f"{choice}: {format_bytes(fitting.device_bytes)}" for choice, fitting in good[:3])
    return f"{text}. Nearest settings that fit: {told}. `ds plan` also predicts activations"
