"""`ds tune`: predictions of candidates, and trials in processes of their own."""

from ds_engine.build.tuning.tuner import Request, tune

__all__ = ["Request", "tune"]
