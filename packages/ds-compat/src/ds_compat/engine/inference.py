"""`deepspeed.init_inference`: that of ds_engine, with DeepSpeed's default dtype."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from ds_engine.config.sections.inference import Dtype, InferenceConfig, read_inference
from ds_engine.inference.engine import InferenceEngine, merged
from ds_engine.inference.engine import init_inference as _init_inference


class DeepSpeedInferenceConfig(InferenceConfig):
    """The same keys as in ds_engine; the default dtype is fp16, as in DeepSpeed."""

    dtype: Dtype = Field(default=torch.float16)


def init_inference(model: nn.Module, config: Any = None, **kwargs: Any) -> InferenceEngine:
    """See `ds_engine.init_inference`.

    Raises:
        ValueError: a key has two different values, or the configuration has a mistake.
    """
    if config is not None and not isinstance(config, (str, dict)):
        raise ValueError(f"'config' argument expected string or dictionary, got {type(config)}")
    return _init_inference(model, read_inference(merged(config, kwargs), DeepSpeedInferenceConfig))


def default_inference_config() -> dict[str, Any]:
    """Returns every key with its default."""
    return DeepSpeedInferenceConfig().model_dump()
