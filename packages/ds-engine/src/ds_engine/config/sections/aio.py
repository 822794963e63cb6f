"""The section `aio`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class AioConfig(Section):
    """How files on a disk are read and written when optimizer states or parameters are kept there."""

    block_size: Positive = Field(default=2**20, description="Size of one read or write request, in bytes.")
    queue_depth: Positive = Field(
        default=8, description="Number of requests that each thread keeps in flight."
    )
    intra_op_parallelism: Positive = Field(
        default=1, description="Number of threads that share one read or write."
    )
    single_submit: bool = Field(
        default=False, description="Submits requests one at a time instead of in batches."
    )
    overlap_events: bool = Field(
        default=True, description="Submits new requests while earlier ones complete."
    )
    use_gds: bool = Field(
        default=False, description="Copies directly between disk and GPU memory (GPUDirect Storage)."
    )
