"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_core import kernels
from ds_core.optim import Batch, FusedAdagrad
from ds_offload.optim.on_host import ElementWise


class CPUAdagrad(ElementWise, FusedAdagrad):
    """`ds_core.optim.FusedAdagrad` on the host, for parameters in fp32, bf16 or fp16; states on huge pages.

    Takes sparse gradients, as of `nn.Embedding(sparse=True)`: only the rows with a gradient are read and written, which
    gives the result of the dense gradient.

    `state_dtype` ("fp32", "bf16"), `split_masters` and `seed`: see `ElementWise`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        split_masters: bool = False,
        seed: int = 0,
    ) -> None:
        dtype = self._choose_formats(state_dtype, split_masters, seed)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            maximize=maximize,
            state_dtype=dtype,
        )

    def _step_group(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        sparse = [i for i, p in enumerate(params) if p.grad is not None and p.grad.is_sparse]
        if not sparse:
            super()._step_group(group, params, out, grad_scale, checksums)
            return
        assert checksums is None, "sparse gradients have no checksums"
        if group["weight_decay"]:
            raise ValueError(
                f"CPUAdagrad: weight_decay {group['weight_decay']:g} with sparse gradients: the decay would change "
                "every row; set it to 0, or use sparse=False in the embedding"
            )
        dense = [i for i in range(len(params)) if i not in set(sparse)]
        copies = None if out is None else [out[i] for i in dense]
        super()._step_group(group, [params[i] for i in dense], copies, grad_scale)
        with torch.no_grad():
            for i in sparse:
                self._step_rows(group, params[i], grad_scale)
                copy = out[i] if out is not None else None
                if copy is not None:
                    copy.copy_(params[i])

    def _step_rows(self, group: dict[str, Any], param: Tensor, grad_scale: float) -> None:
        """Updates the rows that have a gradient."""
        assert param.grad is not None
        grad = param.grad.coalesce()
        rows = grad.indices()[0]
        if grad.sparse_dim() != 1:
            raise ValueError(
                f"CPUAdagrad: a sparse gradient of shape {tuple(grad.shape)} has {grad.sparse_dim()} sparse "
                "dimensions: only rows may be sparse"
            )
        state, _ = self._prepare(param, group)
        names = self._names(group)
        batch = Batch(
            int(state["step"]) + 1,
            params=[param.detach()[rows]],
            grads=[grad.values().contiguous()],
            states={name: [state[name][rows]] for name in names},
            rows=[0],
        )
        batch.formats = self._formats(batch)
        self._apply(group, batch, -grad_scale if group["maximize"] else grad_scale)
        param.detach().index_copy_(0, rows, batch.params[0])
        for name in names:
            state[name].index_copy_(0, rows, batch.states[name][0])
        state["step"] += 1
