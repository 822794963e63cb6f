"""`deepspeed.sequence` and `deepspeed.runtime.sequence_parallel`, over ds_layers."""
