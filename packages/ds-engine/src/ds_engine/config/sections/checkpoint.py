"""The section `checkpoint`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.support.section import Positive, Section, lowered


class ParallelWriteConfig(Section):
    """Which ranks write."""

    pipeline_stage: bool = Field(
        default=False, description="All ranks of a pipeline stage write, not one of them."
    )


class WriterConfig(Section):
    """How DeepSpeed writes."""

    type: Annotated[Literal["mock", "python", "fast"], BeforeValidator(lowered)] = Field(
        default="fast", description='"mock" writes nothing.'
    )
    io_buffer_size: Positive = Field(default=64 * 2**20, description="Bytes of a buffer.")
    io_buffer_double: bool = Field(default=True, description="Fill one buffer while the other is written.")
    show_statistics: bool = Field(default=False, description="Print the speed of writing.")
    data_parallel: Annotated[Literal["replica", "socket", "machine"] | None, BeforeValidator(lowered)] = (
        Field(default=None, description="Data-parallel ranks that write parts of what they hold alike.")
    )
    decoupled: bool = Field(default=False, description="Write while training goes on.")
    io_multiplier: Positive = Field(default=1, description="Writers for each rank.")


class CheckpointConfig(Section):
    """What `save_checkpoint` keeps and how it writes."""

    keep_last: Positive | None = Field(
        default=None,
        description="Complete checkpoints to keep in a directory; older ones are removed after a new one is "
        "safely there. "
        "Default: keep all.",
    )
    tag_validation: Annotated[Literal["warn", "ignore", "fail"], BeforeValidator(lowered)] = Field(
        default="warn", description="What happens when ranks save under different tags."
    )
    load_universal: bool = Field(
        default=False, description="load_checkpoint() reads DeepSpeed's universal format."
    )
    use_node_local_storage: bool = Field(
        default=False, description="Each node keeps the files of its own ranks."
    )
    parallel_write: ParallelWriteConfig = Field(
        default_factory=ParallelWriteConfig, description="Which ranks write."
    )
    checkpoint_serialization: bool = Field(default=True, description="Pickle what is written.")
    writer: WriterConfig | None = Field(default=None, description="DeepSpeed's fast writers.")
