"""DeepSpeed's configuration as attributes and sections, read by ds_engine."""
