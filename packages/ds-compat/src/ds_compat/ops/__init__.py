"""`deepspeed.ops`: optimizers, and op builders, which compile nothing."""
