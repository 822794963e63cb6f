"""Where the original reads a configuration in another way than ds_engine."""

from __future__ import annotations

from typing import Any

PERSISTENCE_THRESHOLD = 100_000
"""Elements up to which the original keeps a parameter of stage 3 on every rank; in small models, ds_engine keeps fewer.
"""

_OF_DYNAMIC_SCALE = frozenset({"loss_scale_window", "hysteresis", "min_loss_scale"})


def adapted(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration for ds_engine: with those defaults of DeepSpeed that code can observe, and without
    settings that DeepSpeed does not read.
    """
    settings = dict(raw)
    for name, adapt in (("fp16", _fp16), ("zero_optimization", _zero)):
        if isinstance(raw.get(name), dict):
            settings[name] = adapt(raw[name])
    return settings


def _fp16(section: dict[str, Any]) -> dict[str, Any]:
    """Removes the settings of a dynamic loss scale if the scale is static: some configurations have a 0 there, which
    ds_engine refuses.
    """
    if section.get("enabled") is True and not section.get("loss_scale"):
        return section
    return {key: value for key, value in section.items() if key not in _OF_DYNAMIC_SCALE}


def _zero(section: dict[str, Any]) -> dict[str, Any]:
    """With the original's threshold: parameters up to it can be read outside of their module."""
    given = ("stage3_param_persistence_threshold", "param_persistence_threshold")
    if section.get("stage") != 3 or any(section.get(key, "auto") != "auto" for key in given):
        return section
    rest = {key: value for key, value in section.items() if key not in given}
    return {**rest, "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD}
