"""The model's own configuration, as Hugging Face's models have one: it travels in a checkpoint, to be exported."""

from __future__ import annotations

from torch import nn

MODEL_CONFIG = "model_config"
"""Key in a manifest's values: the text of config.json, or None."""


def model_config(model: nn.Module) -> str | None:
    """The text of the config.json of a model that has a configuration with `to_json_string`; else None."""
    make = getattr(getattr(model, "config", None), "to_json_string", None)
    if not callable(make):
        return None
    text = make()
    return text if isinstance(text, str) else None
