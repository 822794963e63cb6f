"""What a training loop calls: `shard`, clipping, `no_sync`, `destroy`, and the report of memory."""
