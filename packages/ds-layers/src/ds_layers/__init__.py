"""Inside a layer: activation checkpointing, token dropping, tiles, and random streams for model parallelism."""

from ds_layers.checkpointing import Checkpointing, CheckpointingConfig, Statistics
from ds_layers.dropping import DroppingConfig, TokenDropping
from ds_layers.rng import RngTracker, model_parallel_seed
from ds_layers.sequence_tiles import outputs_of_tiles, tiled_loss, tiled_over_sequence
from ds_layers.tiled import TiledLinear

__version__ = "0.1.0"

__all__ = [
    "Checkpointing",
    "CheckpointingConfig",
    "DroppingConfig",
    "RngTracker",
    "Statistics",
    "TiledLinear",
    "TokenDropping",
    "model_parallel_seed",
    "outputs_of_tiles",
    "tiled_loss",
    "tiled_over_sequence",
]
