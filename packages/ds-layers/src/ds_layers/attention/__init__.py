"""Attention on one rank: torch's kernel, and blocks of it with their log-sum-exp."""
