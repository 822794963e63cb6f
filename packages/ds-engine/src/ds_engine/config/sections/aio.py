"""The section `aio`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class AioConfig(Section):
    """How files on a disk are read and written when optimizer states or parameters are kept there."""

    block_size: Positive = Field(default=2**20, description="Size of one read or write request, in bytes.")
    queue_depth: Positive = Field(
        default=32, description="Number of requests that the disk has at a time. DeepSpeed's default is 8."
    )
    intra_op_parallelism: Positive | None = Field(
        default=None,
        description="Number of threads that read and write. Default: one with io_uring, where one is enough, and 8 "
        "where the system does not permit io_uring. DeepSpeed's default is 1.",
    )
    single_submit: bool = Field(
        default=False, description="Submits requests one at a time instead of in batches."
    )
    overlap_events: bool = Field(
        default=True, description="Submits new requests while earlier ones complete."
    )
    verify: Literal["off", "sampled", "full"] = Field(
        default="full",
        description='Which blocks have a checksum in memory that is compared when they are read: all ("full"), one in '
        'sixteen ("sampled"), or none ("off").',
    )
    use_gds: bool = Field(
        default=False, description="Copies directly between disk and GPU memory (GPUDirect Storage)."
    )
