"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ds_core.optim import FusedLion
from ds_offload.optim.on_host import ElementWise


class CPULion(ElementWise, FusedLion):
    """`ds_core.optim.FusedLion` on the host, for parameters in fp32, bf16 or fp16; states on huge pages.

    `state_dtype` ("fp32", "bf16"), `split_masters` and `seed`: see `ElementWise`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        split_masters: bool = False,
        seed: int = 0,
    ) -> None:
        dtype = self._choose_formats(state_dtype, split_masters, seed)
        super().__init__(params, lr, betas, weight_decay, maximize=maximize, state_dtype=dtype)
