"""The Hugging Face configuration of a model: it is saved in a checkpoint and exported with the weights."""

from __future__ import annotations

from torch import nn

MODEL_CONFIG = "model_config"
"""Key in a manifest's values; the value is the text of config.json, or None."""


def model_config(model: nn.Module) -> str | None:
    """Returns the text of config.json if the model has a configuration with `to_json_string`; else None."""
    make = getattr(getattr(model, "config", None), "to_json_string", None)
    if not callable(make):
        return None
    text = make()
    return text if isinstance(text, str) else None
