"""The section `integrity`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Count, Section


class IntegrityConfig(Section):
    """Checks that find corrupted values during training."""

    replica_check_interval: Count = Field(
        default=100,
        description="Number of optimizer steps between two comparisons, bit by bit, of the parameters and optimizer "
        "states that several ranks hold. A difference raises ds_zero.ReplicaError on every rank. 0: never.",
    )
    checksums: bool = Field(
        default=False,
        description="Whether each rank keeps checksums of its masters, optimizer states and reduced gradients, and "
        "compares them at the next read: in the next step, and when a checkpoint is saved. A difference raises "
        "ds_zero.ChecksumError on every rank. On the CPU it costs a part of the optimizer's time: "
        "docs/guide/silent-corruption.md.",
    )
    message_checksums: bool = Field(
        default=False,
        description="Whether ranks compare what they receive when parameters are gathered and gradients reduced with "
        "checksums of what was sent. A difference raises an error that names both ranks. On the CPU only.",
    )
