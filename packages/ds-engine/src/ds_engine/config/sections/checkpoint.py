"""The section `checkpoint`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.support.section import Positive, Section, lowered


class ParallelWriteConfig(Section):
    """Which ranks write a checkpoint."""

    pipeline_stage: bool = Field(
        default=False, description="Lets all ranks of a pipeline stage write, instead of one rank per stage."
    )


class WriterConfig(Section):
    """How checkpoint files are written."""

    type: Annotated[Literal["mock", "python", "fast"], BeforeValidator(lowered)] = Field(
        default="fast", description='Kind of DeepSpeed\'s writer; "mock" writes nothing.'
    )
    io_buffer_size: Positive = Field(default=64 * 2**20, description="Size of a write buffer, in bytes.")
    io_buffer_double: bool = Field(
        default=True, description="Uses two buffers, so that one is filled while the other is written."
    )
    show_statistics: bool = Field(default=False, description="Prints the write speed.")
    data_parallel: Annotated[Literal["replica", "socket", "machine"] | None, BeforeValidator(lowered)] = (
        Field(
            default=None,
            description="Which data-parallel ranks share the writing of data that they hold alike. Default: one "
            "rank writes it.",
        )
    )
    decoupled: bool = Field(
        default=False, description="Writes a checkpoint in the background while training continues."
    )
    io_multiplier: Positive = Field(default=1, description="Number of writer threads per rank.")


class MemoryCopiesConfig(Section):
    """Copies of the newest state in the memory of several hosts."""

    interval: Positive | None = Field(
        default=None,
        description="Number of steps from one copy to the next. Default: only engine.save_copy() makes them.",
    )
    copies: Positive = Field(
        default=1,
        description="Number of other hosts that keep each rank's part; so many hosts may be lost at once.",
    )


class CheckpointConfig(Section):
    """How many checkpoints save_checkpoint() keeps, and how it writes them."""

    keep_last: Positive | None = Field(
        default=None,
        description="Number of complete checkpoints that a directory keeps; older ones are removed after a "
        "new one is complete. Default: all are kept.",
    )
    tag_validation: Annotated[Literal["warn", "ignore", "fail"], BeforeValidator(lowered)] = Field(
        default="warn", description="What happens when ranks save under different tags."
    )
    load_universal: bool = Field(
        default=False, description="Lets load_checkpoint() read DeepSpeed's universal format."
    )
    use_node_local_storage: bool = Field(
        default=False, description="Lets each machine keep the files of its own ranks."
    )
    parallel_write: ParallelWriteConfig = Field(
        default_factory=ParallelWriteConfig, description="Which ranks write a checkpoint."
    )
    checkpoint_serialization: bool = Field(default=True, description="Pickles the objects that are written.")
    writer: WriterConfig | None = Field(
        default=None,
        description="How checkpoint files are written. Default: by one writer, before save_checkpoint() "
        "returns.",
    )
    memory_copies: MemoryCopiesConfig | None = Field(
        default=None,
        description="Keeps the newest state in the memory of several hosts too, from which engine.resume() restores it "
        "after the loss of a host. Default: checkpoints are on the disk only.",
    )
