"""What the optimizers for host memory share: where states are, and parameters in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_core import arena, kernels
from ds_core.optim import Batch, FusedOptimizer
from ds_offload.interfaces import KeepsStates
from ds_offload.paging.tensors import flat, flat_as
from ds_offload.undo import Undoable

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that are updated in fp32 and rounded."""

_SLICE_NUMEL = 1 << 18
"""Elements of a 16-bit parameter that are updated at a time. In fp32 they take 1 MiB, which stays in the cache."""


class OnHost(Undoable, FusedOptimizer):
    """A mixin for the classes of `ds_core.optim`: states on huge pages, steps that can be taken back, and parameters
    on the CPU only, except for those that a store keeps on the device.
    """

    steps_narrow = False
    """Whether 16-bit parameters can be stepped."""

    _store: KeepsStates | None = None

    def keep_states_in(self, store: KeepsStates) -> None:
        """Steps the parameters that `store` keeps on the device there, with their states beside them."""
        self._store = store

    def new_state(self, param: Tensor) -> Tensor:
        """Returns a zero-filled state in the arena, or beside a parameter that the store keeps on the device.

        Raises:
            ValueError: the parameter is not on the CPU, or its dtype cannot be stepped.
        """
        store = self._store
        if store is not None and (param.device.type != "cpu" or store.state_tier(param) == "device"):
            return torch.zeros_like(param, dtype=self._state_dtype)
        name = type(self).__name__
        if param.device.type != "cpu":
            raise ValueError(
                f"{name}: a parameter of shape {tuple(param.shape)} is on {param.device}: keep masters on the host "
                "(ds_zero.shard(..., store=HostStore())), or use the optimizers of ds_core.optim"
            )
        if param.dtype != torch.float32 and not (self.steps_narrow and param.dtype in NARROW):
            able = "fp32, bf16 and fp16" if self.steps_narrow else "fp32"
            raise ValueError(
                f"{name}: a parameter of shape {tuple(param.shape)} is {param.dtype}: {name} steps {able} parameters; "
                "shard the model with ds_zero, which creates fp32 masters, or convert it with model.float()"
            )
        return arena.empty(param.numel(), self._state_dtype).zero_().as_strided(param.size(), param.stride())


class ElementWise(OnHost):
    """`OnHost` for element-wise optimizers, which also step bf16 and fp16 parameters: each element is widened to fp32,
    updated, and rounded to nearest even. States are as for fp32 parameters.

    Repeated rounding loses updates that are smaller than half the distance of two 16-bit numbers. fp32 masters, as
    ds_zero makes them, keep them.
    """

    steps_narrow = True

    def _step_group(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        narrow = [i for i, p in enumerate(params) if p.dtype in NARROW and p.grad is not None and p.numel()]
        if not narrow:
            super()._step_group(group, params, out, grad_scale, checksums)
            return
        assert checksums is None, "checksums of 16-bit parameters are computed in passes of their own"
        rest = [i for i, p in enumerate(params) if p.dtype not in NARROW]
        others = None if out is None else [out[i] for i in rest]
        super()._step_group(group, [params[i] for i in rest], others, grad_scale)
        with torch.no_grad():
            for i in narrow:
                self._step_narrow(group, params[i].detach(), params[i], grad_scale)
                copy = out[i] if out is not None else None
                if copy is not None:
                    copy.copy_(params[i])

    def _step_narrow(self, group: dict[str, Any], values: Tensor, param: Tensor, grad_scale: float) -> None:
        """Updates a 16-bit parameter slice by slice.

        Args:
            values: the parameter, detached.
        """
        state, step = self._prepare(param, group)
        number = step if step is not None else int(state["step"]) + 1
        assert param.grad is not None
        place, grad = flat(values), flat_as(param.grad, values)
        moments = {name: flat(state[name]) for name in self._names(group)}
        scale = -grad_scale if group.get("maximize", False) else grad_scale
        wide = torch.empty(min(_SLICE_NUMEL, place.numel()))
        for begin in range(0, place.numel(), _SLICE_NUMEL):
            part = slice(begin, min(begin + _SLICE_NUMEL, place.numel()))
            own = wide[: part.stop - part.start].copy_(place[part])
            batch = Batch(
                number,
                params=[own],
                grads=[grad[part]],
                states={name: [moment[part]] for name, moment in moments.items()},
                out=[place[part]],
                rows=[0],
            )
            self._apply(group, batch, scale)
        if step is None:
            state["step"] += 1
