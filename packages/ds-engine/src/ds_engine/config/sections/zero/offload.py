"""The sections `offload_optimizer` and `offload_param` of `zero_optimization`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Section, Share

Device = Literal["none", "cpu", "nvme"]


class OffloadOptimizerConfig(Section):
    """Where fp32 master parameters and optimizer states are kept, and where the optimizer runs."""

    device: Device = Field(
        default="none",
        description='"none" keeps them on the device of the model. "cpu" keeps them in host memory, where the '
        'optimizer runs. "nvme" keeps them on a disk.',
    )
    nvme_path: str | None = Field(
        default=None,
        description='Directory on the disk, for device "nvme". Required by "nvme". Default: none.',
    )
    buffer_count: Count = Field(
        default=4,
        description='Number of pages of optimizer states, of 64 MiB each, that are in host memory with device "nvme"; '
        "at least 3.",
    )
    pin_memory: bool = Field(
        default=True,
        description="Uses page-locked host memory on a machine with an accelerator, for faster copies.",
    )
    pipeline_read: bool = Field(
        default=False, description="Reads the next part from the disk while the current part is stepped."
    )
    pipeline_write: bool = Field(
        default=False, description="Writes the previous part to the disk while the current part is stepped."
    )
    fast_init: bool = Field(
        default=False, description="Creates the states on the disk without reading them back."
    )
    ratio: Share = Field(
        default=1.0,
        description="Fraction of the elements that are offloaded and stepped on the host, between 0 and 1. Masters, "
        "gradients and states of the others stay on the device, where they are stepped. DeepSpeed accepts a fraction "
        "below 1 only at stage 3.",
    )
    overlap_step: bool = Field(
        default=False,
        description="Updates parameters during the backward, as soon as their gradients are complete, and takes the "
        "updates back if clipping or an overflow makes the step differ: the result has the same bits. Needs bf16 or "
        "fp16.",
    )
    undo_bytes: Count | None = Field(
        default=None,
        description="With overlap_step: maximum bytes of memory of a rank for values before and after these updates. "
        "What does not fit is updated after the backward. Values on a disk need none. Default: no limit.",
    )
    super_offload: bool = Field(
        default=False,
        description="DeepSpeed's name of overlap_step, which here works at every stage and with disks.",
    )
    cpuadam_cores_perc: Share | None = Field(
        default=None,
        description="Fraction of the cores of a rank, between 0 and 1, to which the threads of the optimizer on the "
        "host are bound, rounded up: the last ones. The others are left to the workers of a data loader. Default: the "
        "optimizer computes on torch's threads.",
    )


class OffloadParamConfig(Section):
    """Where sharded parameters of stage 3 are kept while they are not in use."""

    device: Device = Field(
        default="none",
        description='"none" keeps them on the device of the model, "cpu" in host memory, "nvme" on a disk. '
        'Below stage 3, and where the model is on the CPU, "cpu" has no effect.',
    )
    nvme_path: str | None = Field(
        default=None,
        description='Directory on the disk, for device "nvme". Required by "nvme". Default: none.',
    )
    buffer_count: Count = Field(default=5, description="Number of host buffers for reading from the disk.")
    buffer_size: Count = Field(default=100_000_000, description="Size of one of these buffers, in elements.")
    max_in_cpu: Count = Field(
        default=0,
        description='Number of elements of a rank that stay in host memory with device "nvme", as far as whole buckets '
        "fit. DeepSpeed's default is 1e9.",
    )
    pin_memory: bool = Field(
        default=True,
        description="Uses page-locked host memory on a machine with an accelerator, for faster copies. If the "
        "optimizer is offloaded, too, its pin_memory decides.",
    )
