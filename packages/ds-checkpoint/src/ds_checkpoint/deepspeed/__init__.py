"""DeepSpeed's checkpoints, read as if they were ours. Nothing here imports DeepSpeed, or runs what is pickled."""

from ds_checkpoint.deepspeed.files import is_checkpoint, locate
from ds_checkpoint.deepspeed.source import DeepSpeedCheckpoint

__all__ = ["DeepSpeedCheckpoint", "is_checkpoint", "locate"]
