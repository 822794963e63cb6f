"""Optimizers for state in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_core import arena
from ds_core.optim import FusedAdam


class CPUAdam(FusedAdam):
    """AdamW (or Adam, with `adamw_mode=False`) on the host: one pass over memory, states on huge pages.

    An ordinary `torch.optim.Optimizer` for fp32 CPU parameters. For a sharded model, the same pass also unscales and
    clips the gradients and writes the low-precision copy of the parameters. Its arithmetic is
    `ds_core.optim.FusedAdam`'s, bit for bit.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay per step, multiplied by lr; with `adamw_mode=False`, L2 regularisation added to
            the gradient.
        adamw_mode: decouple the decay (Loshchilov and Hutter 2019).
        bias_correction: divide the moments by 1 - beta^t, as in the paper.
        state_dtype: torch.float32, or torch.bfloat16 to halve the states.

    Raises:
        ValueError: a parameter that is not an fp32 tensor on the CPU, or a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adamw_mode: bool = True,
        bias_correction: bool = True,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled=adamw_mode,
            bias_correction=bias_correction,
            state_dtype=state_dtype,
        )

    def new_state(self, param: Tensor) -> Tensor:
        if param.device.type != "cpu":
            raise ValueError(
                f"CPUAdam: a parameter of shape {tuple(param.shape)} is on {param.device}: keep masters on "
                "the host "
                "(ds_zero.shard(..., store=HostStore())), or use ds_core.optim.FusedAdam"
            )
        if param.dtype != torch.float32:
            raise ValueError(
                f"CPUAdam: a parameter of shape {tuple(param.shape)} is {param.dtype}: CPUAdam steps fp32 "
                "parameters; shard the model with ds_zero, which creates fp32 masters, or convert it with "
                "model.float()"
            )
        return arena.empty(param.numel(), self._state_dtype).zero_().as_strided(param.size(), param.stride())
