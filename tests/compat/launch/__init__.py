"""The launcher under DeepSpeed's names."""
