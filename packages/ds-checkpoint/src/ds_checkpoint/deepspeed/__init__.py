"""Reads DeepSpeed's checkpoints through the interface of ours. It neither imports DeepSpeed nor executes pickles."""

from ds_checkpoint.deepspeed.files import is_checkpoint, locate
from ds_checkpoint.deepspeed.source import DeepSpeedCheckpoint

__all__ = ["DeepSpeedCheckpoint", "is_checkpoint", "locate"]
