"""The section `aio`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class AioConfig(Section):
    """How files on a disk are read and written when states or parameters rest there."""

    block_size: Positive = Field(default=2**20, description="Bytes of one request.")
    queue_depth: Positive = Field(
        default=8, description="Requests under way at the same time, for each thread."
    )
    intra_op_parallelism: Positive = Field(default=1, description="Threads for one read or write.")
    single_submit: bool = Field(default=False, description="Submit requests one by one.")
    overlap_events: bool = Field(default=True, description="Submit new requests while others complete.")
    use_gds: bool = Field(
        default=False, description="Copy between disk and GPU directly (GPUDirect Storage)."
    )
