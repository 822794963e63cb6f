"""Sequence parallelism: ranks that process different tokens of the same samples."""
