"""In which dtype the model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_engine.config.model import DsConfig


class Precision:
    """fp32: nothing is cast. bf16: parameters (by ds_zero, which keeps fp32 masters) and floating-point
    inputs.
    """

    def __init__(self, param_dtype: torch.dtype | None) -> None:
        self.param_dtype = param_dtype

    @classmethod
    def of(cls, config: DsConfig) -> Precision:
        return cls(torch.bfloat16 if config.bf16.enabled else None)

    def cast(self, value: Any) -> Any:
        """`value` with the floating-point tensors in it (inside lists, tuples and dicts) in the compute
        dtype.
        """
        if self.param_dtype is None:
            return value
        if isinstance(value, Tensor):
            return value.to(self.param_dtype) if value.is_floating_point() else value
        if type(value) is dict:
            return {key: self.cast(inner) for key, inner in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.cast(inner) for inner in value))
        if type(value) in (list, tuple):
            return type(value)(self.cast(inner) for inner in value)
        return value

    def __str__(self) -> str:
        return (
            "as the model is, usually fp32"
            if self.param_dtype is None
            else "bf16, with fp32 masters, sums and states"
        )
