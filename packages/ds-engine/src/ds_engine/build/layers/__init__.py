"""ds-layers for an engine: activation checkpointing, token dropping, sparse attention, tensor parallelism."""

from ds_engine.build.layers.attention import sparse_attention
from ds_engine.build.layers.checkpointing import recompute, token_dropper

__all__ = ["recompute", "sparse_attention", "token_dropper"]
