"""`deepspeed.ops`: the optimizers under DeepSpeed's names and with its arguments."""

from __future__ import annotations

from typing import Any

import ds_core.optim
from ds_compat.ops.any_dtype import StepsAnyDtype


class InstanceOfBase(type):
    """Makes `isinstance` true for the optimizers that `deepspeed.initialize` creates, which are instances of the base
    classes in ds_core and ds_offload.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        below = [kind for kind in cls.__mro__[1:] if not kind.__module__.startswith("ds_compat.")]
        return isinstance(instance, below[0])


class FusedAdam(StepsAnyDtype, ds_core.optim.FusedAdam, metaclass=InstanceOfBase):
    """Adam and AdamW, in one kernel."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        refuse(amsgrad=amsgrad)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=adam_w_mode,
            bias_correction=bias_correction,
        )


class FusedLamb(ds_core.optim.FusedLamb, metaclass=InstanceOfBase):
    """LAMB."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        **others: Any,
    ) -> None:
        others.pop("max_grad_norm", None)  # ignored: the engine clips gradients
        refuse(eps_inside_sqrt=eps_inside_sqrt, **others)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_ratio=min_coeff,
            max_ratio=max_coeff,
            bias_correction=bias_correction,
        )


class FusedLion(ds_core.optim.FusedLion, metaclass=InstanceOfBase):
    """Lion."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


def refuse(**asked: bool) -> None:
    """Raises RuntimeError for variants that are not supported, as DeepSpeed does for amsgrad."""
    wanted = [name for name, is_asked in asked.items() if is_asked]
    if wanted:
        raise RuntimeError(f"not supported in these optimizers: {', '.join(wanted)}")
