"""Which values are cast, and which are left alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from ds_engine.config import load
from ds_engine.precision import Precision


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


def test_bf16_casts_floating_tensors_wherever_they_are() -> None:
    precision = Precision.of(load({"train_batch_size": 1, "bf16": {"enabled": True}}))
    x, n = torch.ones(2), torch.ones(2, dtype=torch.int64)
    out = precision.cast((x, [x, n], {"a": x, "b": "text"}, Pair(x, {"c": (x,)}), 3))
    assert out[0].dtype == out[1][0].dtype == out[2]["a"].dtype == torch.bfloat16
    assert out[1][1] is n and out[2]["b"] == "text" and out[4] == 3
    assert isinstance(out[3], Pair) and out[3].left.dtype == out[3].right["c"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": False}}])
def test_fp32_casts_nothing(section: dict[str, Any]) -> None:
    precision = Precision.of(load({"train_batch_size": 1, **section}))
    value = (torch.ones(1, dtype=torch.float64), [torch.ones(1)])
    assert precision.cast(value) is value
