"""The optimizers of `deepspeed.ops` for parameters in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ds_offload
from ds_compat.ops.any_dtype import StepsAnyDtype
from ds_compat.ops.optimizers import FusedLion, InstanceOfBase, refuse


class DeepSpeedCPUAdam(StepsAnyDtype, ds_offload.CPUAdam, metaclass=InstanceOfBase):
    """Adam and AdamW with states in host memory.

    Args:
        fp32_optimizer_states: if False, the moments of bf16 parameters are in bf16, too.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse(amsgrad=amsgrad)
        super().__init__(
            model_params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            adamw_mode=adamw_mode,
            bias_correction=bias_correction,
        )
        self._fp32_states = fp32_optimizer_states

    def new_state(self, param: Tensor) -> Tensor:
        if param.dtype == torch.float32 or param.device.type != "cpu":
            return super().new_state(param)
        narrow = param.dtype == torch.bfloat16 and not self._fp32_states
        return torch.zeros_like(param, dtype=torch.bfloat16 if narrow else torch.float32)

    # --- one subgroup at a time

    def step_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the only parameter in the groups that has a gradient, with the moments `state[subgroup_id]`. So code
        can put the parameters of one subgroup after the other into the groups.
        """
        loss = closure() if closure is not None else None
        group, param = self._only_parameter()
        state = self.state[subgroup_id]  # type: ignore[index]
        if not state:
            state["step"] = 0
            state |= {name: self.new_state(param) for name in self.state_names}
        self._update(group, param, state, state["step"] + 1, 1.0)
        state["step"] += 1
        return loss

    def rollback_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Undoes the last `step_subgroup`: restores parameter and moments, except for rounding. The parameter must
        still have the gradient of that step.

        Raises:
            RuntimeError: there is no step to undo.
        """
        loss = closure() if closure is not None else None
        if not self.state.get(subgroup_id):  # type: ignore[call-overload]
            raise RuntimeError(
                f"Cannot rollback optimizer state for sub_group_id {subgroup_id}: step_subgroup({subgroup_id}) was "
                "not called"
            )
        state = self.state[subgroup_id]  # type: ignore[index]
        if state["step"] == 0:
            raise RuntimeError(
                f"Cannot rollback sub_group_id {subgroup_id}: step count is 0, all its steps have been undone already"
            )
        group, param = self._only_parameter()
        self._undo(group, param, state)
        state["step"] -= 1
        return loss

    def _only_parameter(self) -> tuple[dict[str, Any], Tensor]:
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if len(held) != 1:
            raise ValueError(
                f"the groups have {len(held)} parameters with a gradient, but a subgroup is one flat parameter: put "
                "only that one into param_groups"
            )
        return held[0]

    @torch.no_grad()
    def _undo(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Computes the values before the step, by Adam's equations solved for them."""
        assert param.grad is not None
        beta1, beta2 = group["betas"]
        lr, decay, step = float(group["lr"]), group["weight_decay"], state["step"]
        correction1 = 1 - beta1**step if self._bias_correction else 1.0
        correction2 = 1 - beta2**step if self._bias_correction else 1.0
        mean, square = state["exp_avg"].float(), state["exp_avg_sq"].float()
        move = (mean / correction1) / ((square / correction2).sqrt() + group["eps"])
        before = param.float() + lr * move
        grad = param.grad.float()
        if group["decoupled_weight_decay"]:
            before /= 1 - lr * decay
        else:
            grad = grad + decay * before
        state["exp_avg"].copy_((mean - (1 - beta1) * grad) / beta1)
        state["exp_avg_sq"].copy_(((square - (1 - beta2) * grad.square()) / beta2).clamp_(min=0))
        param.copy_(before)


class DeepSpeedCPUAdagrad(ds_offload.CPUAdagrad, metaclass=InstanceOfBase):
    """Adagrad for parameters in host memory."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse(amsgrad=amsgrad)
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


class DeepSpeedCPULion(FusedLion):
    """Lion for parameters in host memory."""
