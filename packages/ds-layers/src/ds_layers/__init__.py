"""Inside a layer: sequence parallelism, activation checkpointing, token dropping, tiles, and random streams for model
parallelism.
"""

from ds_layers.attention.local import sdpa
from ds_layers.checkpointing import Checkpointing, CheckpointingConfig, Statistics
from ds_layers.dropping import DroppingConfig, TokenDropping
from ds_layers.interfaces import AttentionFn
from ds_layers.linear_cross_entropy import linear_cross_entropy
from ds_layers.rng import RngTracker, model_parallel_seed
from ds_layers.sequence.batches import SequenceBatches, divide_batch
from ds_layers.sequence.layout import SequenceLayout
from ds_layers.sequence.loss import mean_over_tokens, sequence_parallel_cross_entropy
from ds_layers.sequence.ring import RingAttention
from ds_layers.sequence.transformers import SequenceParallelAttention, register_with_transformers
from ds_layers.sequence.ulysses import DistributedAttention, Ulysses
from ds_layers.sequence_tiles import outputs_of_tiles, tiled_loss, tiled_over_sequence
from ds_layers.tiled import TiledLinear

__version__ = "0.1.0"

__all__ = [
    "AttentionFn",
    "Checkpointing",
    "CheckpointingConfig",
    "DistributedAttention",
    "DroppingConfig",
    "RingAttention",
    "RngTracker",
    "SequenceBatches",
    "SequenceLayout",
    "SequenceParallelAttention",
    "Statistics",
    "TiledLinear",
    "TokenDropping",
    "Ulysses",
    "divide_batch",
    "linear_cross_entropy",
    "mean_over_tokens",
    "model_parallel_seed",
    "outputs_of_tiles",
    "register_with_transformers",
    "sdpa",
    "sequence_parallel_cross_entropy",
    "tiled_loss",
    "tiled_over_sequence",
]
