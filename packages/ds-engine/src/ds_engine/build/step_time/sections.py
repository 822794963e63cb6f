"""The parts of a plan that are not memory, as tables: time, axes, tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ds_zero
from ds_engine.step_time import AxisTime, Rates, StepTime, Workload, seconds_text
from ds_zero.tensors.sizes import human_bytes


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def time_section(time: StepTime) -> Section:
    """What a step consists of."""
    parts = (
        ("forward and backward", time.compute_s),
        ("waiting for messages, or busy with them", time.exposed_s),
        ("update", time.update_s),
        ("a step", time.total_s),
    )
    rows = [[name, seconds_text(s), f"{s / time.total_s:.0%}"] for name, s in parts]
    return Section(title="time", header=["", "a step", "share"], rows=rows)


def axes_section(axes: Sequence[AxisTime]) -> Section:
    """What a rank sends over each axis."""
    rows = [
        [
            one.axis,
            str(one.ranks),
            human_bytes(round(one.sent_bytes)),
            seconds_text(one.seconds) if one.seconds else "-",
        ]
        for one in axes
    ]
    return Section(title="axes", header=["axis", "ranks", "sent a step", "time of its messages"], rows=rows)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A kind of memory other than that of the device, in a step."""

    name: str
    """"host" or "disk"."""
    held_bytes: int
    """At the peak."""
    moved_bytes: float
    """Copied to or from the device in the busier direction, or read and written, in a step."""
    seconds: float | None
    """How long that takes; it overlaps with the update. None without rates."""


def tiers_of(plan: ds_zero.Plan, work: Workload, rates: Rates | None) -> list[Tier]:
    """The tiers that a plan uses."""
    tiers = []
    activations = 2 * plan.moved_bytes * work.micro_batches
    if plan.host_bytes:
        moved = work.host_copy_bytes + activations
        seconds = None if rates is None else moved / rates.device_host_bytes_per_s
        tiers.append(Tier(name="host", held_bytes=plan.host_bytes, moved_bytes=moved, seconds=seconds))
    if plan.disk_bytes:
        moved = work.disk_read_bytes + work.disk_write_bytes
        seconds = None
        if rates is not None:
            seconds = work.disk_read_bytes / rates.disk_read_bytes_per_s
            seconds += work.disk_write_bytes / rates.disk_write_bytes_per_s
        tiers.append(Tier(name="disk", held_bytes=plan.disk_bytes, moved_bytes=moved, seconds=seconds))
    return tiers


def tiers_section(tiers: Sequence[Tier]) -> Section:
    """What lies in each tier, and what moves."""
    rows = [
        [
            tier.name,
            human_bytes(tier.held_bytes),
            human_bytes(round(tier.moved_bytes)),
            "-" if tier.seconds is None else seconds_text(tier.seconds),
        ]
        for tier in tiers
    ]
    return Section(
        title="tiers", header=["tier", "held by a rank", "moved a step", "time, beside the update"], rows=rows
    )
