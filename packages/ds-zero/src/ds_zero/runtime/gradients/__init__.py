"""The way of a gradient: from autograd through the reduction to the shard, its scale and its norm."""
