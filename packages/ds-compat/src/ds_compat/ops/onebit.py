"""The 1-bit optimizers with DeepSpeed's signatures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ds_comm.optim


class OnebitAdam(ds_comm.optim.OneBitAdam):
    """`ds_comm.optim.OneBitAdam` with DeepSpeed's arguments. `deepspeed`, the engine, has no effect."""

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        *more: Any,
        **others: Any,
    ) -> None:
        names = ("max_grad_norm", "amsgrad", "cuda_aware", "comm_backend_name")
        others |= dict(zip(names, more, strict=False))
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            freeze_step=freeze_step,
            bias_correction=bias_correction,
            eps_inside_sqrt=eps_inside_sqrt,
            **others,
        )
