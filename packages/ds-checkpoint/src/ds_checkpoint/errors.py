"""What is raised when a checkpoint cannot be written or must not be used."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Names the file and the tensor, what is wrong with them, and what to do. The same text is raised on
    every rank.
    """
