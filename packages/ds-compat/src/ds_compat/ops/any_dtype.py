"""Fused optimizers over parameters of any floating-point dtype.

The optimizers of ds_core and ds_offload update fp32 masters, which ds_zero creates. Code that uses DeepSpeed's
optimizers without an engine also passes 16-bit parameters. Those are updated in fp32, and rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_core import kernels
from ds_core.optim import Batch, FusedOptimizer

Group = dict[str, Any]


class StepsAnyDtype(FusedOptimizer):
    """A mixin for classes of ds_core.optim: updates 16-bit parameters one by one, with moments in fp32."""

    sums_narrow = False

    def new_state(self, param: Tensor) -> Tensor:
        if param.dtype == torch.float32:
            return super().new_state(param)
        return torch.zeros_like(param, dtype=self._state_dtype)

    def _step_group(
        self,
        group: Group,
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        if all(param.dtype == torch.float32 for param in params):
            super()._step_group(group, params, out, grad_scale, checksums)
            return
        for i, param in enumerate(params):
            if param.dtype == torch.float32:
                super()._step_group(group, [param], None if out is None else [out[i]], grad_scale)
            elif param.grad is not None:
                state, _ = self._prepare(param, group)
                self._update(group, param, state, int(state["step"]) + 1, grad_scale)
                state["step"] += 1

    @torch.no_grad()
    def _update(
        self, group: Group, param: Tensor, state: dict[str, Any], step: int, grad_scale: float
    ) -> None:
        """Updates `param` and its moments in `state` by `param.grad`, which may have any dtype."""
        assert param.grad is not None
        is_fp32 = param.dtype == torch.float32
        batch = Batch(
            step=step,
            params=[param.detach() if is_fp32 else param.detach().float()],
            grads=[param.grad.float()],
            states={name: [state[name]] for name in self.state_names},
        )
        self._apply(group, batch, grad_scale)
        if not is_fp32:
            param.copy_(batch.params[0])
