"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_core.optim.adam import apply_adam
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_betas, check_not_negative

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration. Its polynomial is steep at zero, so five steps bring every singular value near 1."""


def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns approximately the nearest semi-orthogonal matrix: singular vectors are kept, singular values lie
    between 0.5 and 1.5.

    Shape (rows, columns); the result is in `dtype`. Equations: docs/notes/muon.md.
    """
    a, b, c = QUINTIC
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # now no singular value exceeds 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon_groups(
    named_parameters: Iterable[tuple[str, Tensor]], others: Sequence[str] = ("embed", "lm_head")
) -> list[dict[str, Any]]:
    """Two parameter groups for `Muon`: matrices, updated by Muon, and all others, updated by AdamW.

    The AdamW group contains vectors, and parameters whose name contains one of `others` (embeddings and heads, which
    are lookup tables rather than linear maps between features).
    """
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in named_parameters:
        if param.requires_grad:
            linear = param.ndim >= 2 and not any(word in name.lower() for word in others)
            (matrices if linear else rest).append(param)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "use_muon": True},
        {"params": rest, "use_muon": False},
    ]
    return [group for group in groups if group["params"]]


class Muon(FusedOptimizer):
    """Muon (Jordan et al. 2024): updates each matrix by its orthogonalised momentum; AdamW for groups with `use_muon`
    False.

    Parameters given without groups are sorted by shape: those with two or more dimensions are updated by Muon, as
    matrices of (first dim, product of the others), the rest by AdamW. Embeddings and heads train better under AdamW:
    `muon_groups` makes such groups. Updates of matrices agree with `torch.optim.Muon`.
    """

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    checksums_in_pass: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        """`lr`, `momentum`, `nesterov` and `ns_steps` (of the orthogonalisation) are Muon's; `adam_lr` (None: `lr`),
        `betas` and `eps` AdamW's; `weight_decay` is common.
        """
        check_not_negative(
            lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps, adam_lr=adam_lr or 0.0
        )
        check_betas(betas)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "use_muon": True,
        }
        groups: list[dict[str, Any]] = []
        for given in params:
            groups += [dict(given)] if isinstance(given, dict) else [{"params": [given]}]
        if not any("lr" in g or "use_muon" in g for g in groups):
            groups = _by_shape([p for g in groups for p in g["params"]])
        for group in groups:
            if not group.get("use_muon", True) and adam_lr is not None:
                group.setdefault("lr", adam_lr)
        super().__init__(groups, defaults)
        for index, group in enumerate(self.param_groups):
            flat = [tuple(p.shape) for p in group["params"] if p.ndim < 2] if group["use_muon"] else []
            if flat:
                raise ValueError(
                    f"param_groups[{index}] has use_muon=True and a parameter of shape {flat[0]}: only matrices "
                    "can be orthogonalised; put this parameter into a group with use_muon=False"
                )

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the tensors of a group must stay whole on one rank."""
        return bool(group["use_muon"])

    def _names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        if group["use_muon"]:
            self._apply_muon(group, batch, grad_scale)
            return
        apply_adam(group, batch, grad_scale, decoupled=True)

    @torch.no_grad()
    def _apply_muon(self, group: Group, batch: Batch, grad_scale: float) -> None:
        lr, momentum = float(group["lr"]), float(group["momentum"])
        copies = batch.out or [None] * len(batch.params)
        for param, buffer, grad, out in zip(
            batch.params, batch.states["momentum_buffer"], batch.grads, copies, strict=True
        ):
            if param.ndim < 2:
                raise ValueError(
                    "Muon needs contiguous matrices: use parameter.data = parameter.data.contiguous()"
                )
            if grad_scale != 1.0:
                grad = grad * grad_scale
            buffer.lerp_(grad, 1.0 - momentum)
            update = torch.lerp(grad, buffer, momentum) if group["nesterov"] else buffer
            matrix = orthogonalize(update.reshape(len(update), -1), group["ns_steps"])
            rows, columns = matrix.shape
            param.mul_(1.0 - lr * group["weight_decay"])
            param.add_(matrix.reshape(param.shape), alpha=-lr * math.sqrt(max(1.0, rows / columns)))
            if out is not None:
                out.copy_(param.view(out.shape))


def _by_shape(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "use_muon": True},
        {"params": [p for p in params if p.ndim < 2], "use_muon": False},
    ]
    return [group for group in groups if group["params"]]
