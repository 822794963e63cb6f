"""SGD with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ds_core.optim import FusedSGD
from ds_offload.optim.on_host import ElementWise


class CPUSGD(ElementWise, FusedSGD):
    """`ds_core.optim.FusedSGD` on the host, for parameters in fp32, bf16 or fp16; states on huge pages.

    `state_dtype` ("fp32", "bf16"), `split_masters` and `seed`: see `ElementWise`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        split_masters: bool = False,
        seed: int = 0,
    ) -> None:
        dtype = self._choose_formats(state_dtype, split_masters, seed)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, state_dtype=dtype
        )
