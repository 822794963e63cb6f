"""`deepspeed.ops`: optimizers, and builders that have nothing to build."""
