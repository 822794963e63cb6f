"""Checkpoints: complete or absent, checksummed, loadable on any number of ranks. See docs/design/ds-checkpoint.md."""

from ds_checkpoint.api import load, save
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.export.consolidate import convert, load_into, state_dict
from ds_checkpoint.format.folder import find, latest
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.read.opening import open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert",
    "find",
    "latest",
    "load",
    "load_into",
    "open_checkpoint",
    "save",
    "state_dict",
]
