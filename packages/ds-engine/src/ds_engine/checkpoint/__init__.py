"""The public names of ds_checkpoint. `ds_engine.build.checkpoint` saves and restores an engine."""

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.export import consolidate
from ds_checkpoint.export.consolidate import convert, export, load_into, state_dict
from ds_checkpoint.format import folder
from ds_checkpoint.format.folder import find, latest
from ds_checkpoint.memory.copies import MemoryCopies
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.read.opening import open_checkpoint
from ds_checkpoint.write.background import BackgroundSaver
from ds_checkpoint.write.writer import Content, write

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointError",
    "Content",
    "MemoryCopies",
    "consolidate",
    "convert",
    "export",
    "find",
    "folder",
    "latest",
    "load_into",
    "open_checkpoint",
    "state_dict",
    "write",
]
