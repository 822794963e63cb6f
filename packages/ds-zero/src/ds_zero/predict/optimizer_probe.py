"""Copies of an optimizer over other tensors: over a small one, to find out which states it creates, and over fake
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.interfaces import FusedStep, PlansStates
from ds_zero.layout.optimizer_trial import reproduce
from ds_zero.runtime.optimizer_states import splits_masters

_PROBE_NUMEL = 512


def probe_states(optimizer: Optimizer) -> dict[str, torch.dtype]:
    """Returns name -> dtype of the element-wise states that a step creates, by a step on a small tensor."""
    if isinstance(optimizer, PlansStates):
        return {name: dtype for name, (dtype, _) in optimizer.planned_states(1).items()}
    dtype = torch.float32 if splits_masters(optimizer) is None else torch.bfloat16
    param = nn.Parameter(torch.ones(_PROBE_NUMEL, dtype=dtype))
    param.grad = torch.ones(_PROBE_NUMEL, dtype=dtype)
    groups: list[list[Any]] = [[] for _ in optimizer.param_groups]
    groups[0].append(param)
    trial = reproduce(optimizer, groups)
    with torch.enable_grad():
        trial.step()
    return {
        name: value.dtype
        for name, value in trial.state[param].items()
        if isinstance(value, Tensor) and value.numel() == _PROBE_NUMEL
    }


class _StandInFused(Optimizer):
    """Replaces an optimizer with `step_fused`: it allocates the same states, but computes nothing, because native
    kernels cannot run on fake tensors.
    """

    states: dict[str, torch.dtype]
    stateless: set[int]
    """`id`s of the parameters whose states are on a disk."""
    fractions: Mapping[str, float]
    """Elements of a state for each element of a parameter, where it is not 1."""
    others: list[Tensor]
    """The states in `fractions`, which are not element-wise."""
    elementwise = True
    split_masters = False

    def join_master(self, param: Tensor, master_bits: Tensor) -> Tensor:
        raise AssertionError("a plan reads no masters")

    def split_master(self, master: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a plan writes no masters")

    def _touch(self, params: Sequence[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state and param.numel() and id(param) not in self.stateless:
                state["step"] = torch.zeros(())
                for name, dtype in self.states.items():
                    if name not in self.fractions:
                        state[name] = torch.zeros_like(param, dtype=dtype)
                        continue
                    numel = math.ceil(param.numel() * self.fractions[name])
                    self.others.append(torch.zeros(numel, dtype=dtype, device=param.device))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._touch([p for group in self.param_groups for p in group["params"] if p.grad is not None])

    def step_fused(
        self, params: Sequence[Tensor], *, grad_scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        self._touch(params)


def stand_in(
    optimizer: Optimizer,
    groups: list[list[Any]],
    states: dict[str, torch.dtype],
    *,
    num_ranks: int,
    paged: bool = False,
) -> Optimizer:
    """Returns `optimizer` over fake parameters: of the same class if it uses torch's operations, else a replacement
    with the same `states`.

    Args:
        num_ranks: ranks of the job.
        paged: whether it is used through ds_offload's `PagedOptimizer`, which steps any subset of the parameters.
    """
    planned = optimizer.planned_states(num_ranks) if isinstance(optimizer, PlansStates) else None
    if not paged and planned is None and not isinstance(optimizer, FusedStep):
        return reproduce(optimizer, groups)
    # Under the same name, by which `shard` knows optimizers.
    shares = {name: share for name, (_, share) in planned.items()} if planned is not None else {}
    members = {
        "states": states,
        "stateless": set(),
        "fractions": {name: share for name, share in shares.items() if share != 1.0},
        "others": [],
        "split_masters": splits_masters(optimizer) is not None,
    }
    kind = type(type(optimizer).__name__, (_StandInFused,), members)
    made: Optimizer = kind(
        [{**g, "params": p} for g, p in zip(optimizer.param_groups, groups, strict=True)],
        dict(optimizer.defaults),
    )
    return made
