"""Checkpoints: complete or absent, checksummed, loadable on any number of ranks and at any stage. See
docs/design/ds-engine.md.
"""

from ds_engine.checkpoint.consolidate import convert, export, load_into, open_checkpoint, state_dict
from ds_engine.checkpoint.errors import CheckpointError
from ds_engine.checkpoint.folder import find, latest
from ds_engine.checkpoint.read import Checkpoint
from ds_engine.checkpoint.write import Content, write

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Content",
    "convert",
    "export",
    "find",
    "latest",
    "load_into",
    "open_checkpoint",
    "state_dict",
    "write",
]
