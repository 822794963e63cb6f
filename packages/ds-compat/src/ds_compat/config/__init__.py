"""DeepSpeed's configuration classes, on top of ds_engine's configuration."""
