"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ds_core.optim import FusedAdam
from ds_offload.optim.on_host import ElementWise


class CPUAdam(ElementWise, FusedAdam):
    """AdamW (or Adam, with `adamw_mode=False`) on the host: one pass over memory, states on huge pages.

    An ordinary `torch.optim.Optimizer` for CPU parameters in fp32, bf16 or fp16. For a sharded model, the same pass
    also unscales and clips the gradients and writes the low-precision copy of the parameters. Its arithmetic is
    `ds_core.optim.FusedAdam`'s, bit for bit; 16-bit parameters are updated in fp32 and rounded.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay per step, multiplied by lr; with `adamw_mode=False`, L2 regularisation added to
            the gradient.
        adamw_mode: decouple the decay (Loshchilov and Hutter 2019).
        bias_correction: divide the moments by 1 - beta^t, as in the paper.
        state_dtype: "fp32", "bf16" (stochastic rounding), "int8" (8-bit moments), or torch.bfloat16 (rounding to
            nearest): see `ElementWise`. Bytes of both moments per element: 8, 4 or 2.
        split_masters: extend bf16 parameters by 16 bits to fp32 masters: see `ElementWise`.
        seed: of stochastic rounding.

    Raises:
        ValueError: a parameter that is not on the CPU or has another dtype, or a hyperparameter out of range.
    """

    formats: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")
    state_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.uint8)

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
        state_dtype: torch.dtype | str = torch.float32,
        split_masters: bool = False,
        seed: int = 0,
    ) -> None:
        dtype = self._choose_formats(state_dtype, split_masters, seed)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled=adamw_mode,
            bias_correction=bias_correction,
            state_dtype=dtype,
        )


class CPUAdamW(CPUAdam):
    """`CPUAdam` with torch's default of the weight decay, 0.01, and without its argument `adamw_mode`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        state_dtype: torch.dtype | str = torch.float32,
        split_masters: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bias_correction,
            state_dtype=state_dtype,
            split_masters=split_masters,
            seed=seed,
        )
