"""The section `checkpoint`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.section import Positive, Section


class CheckpointConfig(Section):
    """What `save_checkpoint` keeps."""

    keep_last: Positive | None = Field(
        default=None,
        description="Complete checkpoints to keep in a directory; older ones are removed after a new one is "
        "safely there. "
        "Default: keep all.",
    )
