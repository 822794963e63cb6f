"""The error for a checkpoint that cannot be written or must not be used."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not match the model. The message names the file and the
    tensor, the fault, and the remedy. All ranks raise the same message.
    """


class LostRanksError(CheckpointError):
    """The ranks have lost their connection: nothing that they do together can go on. The message names the ranks that
    do not answer.
    """
