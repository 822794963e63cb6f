"""Writing with all ranks, at once or in the background."""

from ds_checkpoint.write.writer import Content, write

__all__ = ["Content", "write"]
