"""Writing of checkpoints with all ranks, synchronously or in the background."""

from ds_checkpoint.write.writer import Content, write

__all__ = ["Content", "write"]
