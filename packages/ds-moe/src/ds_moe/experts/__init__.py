"""The experts of a rank: stacked weights and grouped products, and any other module by a loop."""

from ds_moe.experts.feed_forward import FeedForward

__all__ = ["FeedForward"]
