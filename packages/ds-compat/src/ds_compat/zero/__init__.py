"""`deepspeed.zero`, and DeepSpeed's attributes and functions for sharded parameters."""
