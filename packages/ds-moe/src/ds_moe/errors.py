"""The errors of this package."""

from __future__ import annotations


class ExpertParallelError(ValueError):
    """The ranks, groups or sizes of an expert-parallel layer do not go together."""
