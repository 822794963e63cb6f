"""The 1-bit optimizers under DeepSpeed's names. Its second argument `deepspeed`, the engine, has no effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ds_comm.optim


class OnebitAdam(ds_comm.optim.OneBitAdam):
    """`ds_comm.optim.OneBitAdam` with DeepSpeed's arguments."""

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **others: Any,
    ) -> None:
        others = {"freeze_step": freeze_step, "bias_correction": bias_correction, **others}
        super().__init__(params, lr, betas, eps, **others)


class OnebitLamb(ds_comm.optim.OneBitLamb):
    """`ds_comm.optim.OneBitLamb` with DeepSpeed's arguments."""

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **others: Any,
    ) -> None:
        others = {"freeze_step": freeze_step, "bias_correction": bias_correction, **others}
        super().__init__(params, lr, betas, eps, **others)


class ZeroOneAdam(ds_comm.optim.ZeroOneAdam):
    """`ds_comm.optim.ZeroOneAdam` with DeepSpeed's arguments."""

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **others: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, bias_correction=bias_correction, **others)
