"""The functions for a training loop: `shard`, clipping, `no_sync`, `destroy`, and the memory report."""
