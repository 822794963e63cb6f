"""Inference: `init_inference` and generation."""

from ds_engine.inference.engine import InferenceEngine, init_inference

__all__ = ["InferenceEngine", "init_inference"]
