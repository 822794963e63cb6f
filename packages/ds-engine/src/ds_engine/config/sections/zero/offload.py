"""The sections `offload_optimizer` and `offload_param` of `zero_optimization`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Section, Share

Device = Literal["none", "cpu", "nvme"]


class OffloadOptimizerConfig(Section):
    """Where fp32 masters and optimizer states rest, and where the optimizer runs."""

    device: Device = Field(
        default="none",
        description='"none": on the device of the model. "cpu": in host memory, stepped there by CPU-Adam. '
        '"nvme": on a disk.',
    )
    nvme_path: str | None = Field(default=None, description='Directory on the disk, for device "nvme".')
    buffer_count: Count = Field(
        default=4, description="Host buffers that are read and written at the same time."
    )
    pin_memory: bool = Field(
        default=True,
        description="Page-locked host memory beside an accelerator, for faster copies; without one it makes no "
        "difference. It cannot be turned off yet, and false is answered by a warning.",
    )
    pipeline_read: bool = Field(
        default=False, description="Read the next part while the present one is stepped."
    )
    pipeline_write: bool = Field(
        default=False, description="Write the last part while the present one is stepped."
    )
    fast_init: bool = Field(
        default=False, description="Make the states on the disk without reading them back."
    )
    ratio: Share = Field(default=1.0, description="Part of the states that rests on the host; stage 3.")
    super_offload: bool = Field(
        default=False, description="For hosts that share memory with the accelerator; stage 3."
    )
    cpuadam_cores_perc: Share = Field(
        default=0.8, description="Part of the host's cores that steps, with super_offload."
    )


class OffloadParamConfig(Section):
    """Where sharded parameters rest while they are not in use; stage 3."""

    device: Device = Field(
        default="none", description='"none": on the device of the model; "cpu": host memory; "nvme": a disk.'
    )
    nvme_path: str | None = Field(default=None, description='Directory on the disk, for device "nvme".')
    buffer_count: Count = Field(default=5, description="Host buffers for reading from the disk.")
    buffer_size: Count = Field(default=100_000_000, description="Elements of one such buffer.")
    max_in_cpu: Count = Field(
        default=1_000_000_000, description='Elements that stay in host memory with device "nvme".'
    )
    pin_memory: bool = Field(default=True, description="Page-locked host memory, for faster copies.")
