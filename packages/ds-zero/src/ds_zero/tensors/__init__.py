"""Storages, large pages and fingerprints of tensors, and placeholder tensors without memory."""
