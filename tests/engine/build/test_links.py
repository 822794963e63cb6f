"""The engine says, with numbers, where compression would lose on the measured links."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import ds_engine
from ds_engine import ConfigError
from harness import ranks

CODECS = {name: {"encode": "4GB", "decode": "4GB"} for name in ("sign", "int8", "int4")}
FAST = {
    "within_host": {"latency_us": 10, "rate": "1GB"},
    "shared_memory": {"rate": "1000GB"},
    "codecs": CODECS,
}
SLOW = {"within_host": {"latency_us": 10, "rate": "100KB"}, "codecs": CODECS}
QUANTISED = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}


def build(links: dict[str, Any], zero: dict[str, Any], optimizer: str = "AdamW") -> list[str]:
    """Returns the warnings of `initialize`."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "startup_summary": False,
        "links": links,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds_engine.initialize(nn.Linear(256, 256), config)[0].destroy()
    return [str(one.message) for one in caught if "links" in str(one.message)]


@ranks(2)
def test_what_loses_is_named_with_both_durations() -> None:
    first = dist.get_rank() == 0
    assert build(SLOW, QUANTISED) == build(SLOW, {"stage": 0}, "OneBitAdam") == []
    said = build(FAST, QUANTISED)
    assert len(said) == (2 if first else 0)
    if first:
        assert "zero_quantized_weights" in said[0] and "ms compressed" in said[0] and "ms exact" in said[0]
        assert "zero_quantized_gradients" in said[1]
    assert len(build(FAST, {"stage": 0}, "OneBitAdam")) == (1 if first else 0)
    assert build(FAST, {"stage": 3}) == []
    assert build({**FAST, "if_slower": "ignore"}, QUANTISED) == []
    with pytest.raises(ConfigError, match=r"zero_quantized_weights.*ms exact"):
        build({**FAST, "if_slower": "refuse"}, QUANTISED)
    with pytest.raises(ConfigError, match=r"codecs.int8 was not measured"):
        build({**FAST, "codecs": {}}, QUANTISED)
    with pytest.raises(
        ConfigError, match="the link over which these ranks exchange tensors was not measured"
    ):
        build({"between_hosts": {"rate": "1GB"}, "codecs": CODECS}, QUANTISED)
