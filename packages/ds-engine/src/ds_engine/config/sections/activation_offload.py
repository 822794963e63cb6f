"""The section `activation_offload`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Section


class ActivationOffloadConfig(Section):
    """Where activations are kept between forward and backward."""

    device: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description='"none" keeps activations on the device of the model. "cpu" moves them to host memory, "nvme" to a '
        "disk; they return while backward computes other layers.",
    )
    nvme_path: str | None = Field(
        default=None,
        description='Directory on the disk, for device "nvme". Required by "nvme". Default: none.',
    )
    layers: list[str] | None = Field(
        default=None,
        description="Names of the submodules whose activations are moved. Default: those of the whole model.",
    )
    min_bytes: Count = Field(default=65536, description="Smaller tensors stay on the device, in bytes.")
    budget_bytes: Count = Field(
        default=0,
        description="Bytes of activations of one forward that stay on the device: those that backward needs first.",
    )
    prefetch_bytes: Count | None = Field(
        default=None,
        description="Bytes that return before backward asks for them. Default: the activations of one layer.",
    )
    max_host_bytes: Count | None = Field(
        default=None,
        description='Limit of host memory, in bytes. With device "cpu", activations for which there is no room stay on '
        'the device. With "nvme", it is the memory through which they are written. Default: no limit for "cpu", '
        '256 MiB for "nvme".',
    )
