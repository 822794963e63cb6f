"""Checkpoints: complete or absent, checksummed, loadable on any number of ranks. See docs/design/ds-checkpoint.md."""

from ds_checkpoint.api import load, resume, save, save_copy
from ds_checkpoint.deepspeed.pipeline import load_layers, save_layers
from ds_checkpoint.errors import CheckpointError, LostRanksError
from ds_checkpoint.export.consolidate import convert, load_into, state_dict
from ds_checkpoint.format.folder import find, latest
from ds_checkpoint.memory.copies import MemoryCopies
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.read.opening import open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LostRanksError",
    "MemoryCopies",
    "convert",
    "find",
    "latest",
    "load",
    "load_into",
    "load_layers",
    "open_checkpoint",
    "resume",
    "save",
    "save_copy",
    "save_layers",
    "state_dict",
]
