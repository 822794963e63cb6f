"""The same training in plain PyTorch and sharded, for comparison bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_zero
from zero.models import Tiny, assert_consumed, batch

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass
class Job:
    """What is trained; the reference and every stage run exactly this."""

    steps: int = 6
    accumulation: int = 1
    clip: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: MakeOptimizer = lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    dtype: torch.dtype | None = None
    scale: float | ds_zero.DynamicScale | None = None
    """A loss scaler for the sharded run; the norm is then measured without clipping, too."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Tiny(**self.model)


@dataclass
class Result:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    overlap: ds_zero.StepOverlap | None = None


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _mean(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Mean over ranks in the order of rank indices; a gradient that no rank has stays None."""
    _, size = world()
    out: list[Tensor | None] = []
    for grad in grads:
        if grad is None:
            out.append(None)
            continue
        parts = [torch.empty_like(grad) for _ in range(size)]
        dist.all_gather(parts, grad)
        out.append(_tree(parts) / size)
    return out


def _tree(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    middle = 1 << ((len(parts) - 1).bit_length() - 1)
    return _tree(parts[:middle]) + _tree(parts[middle:])


def plain(job: Job, plan: str, norm: Callable[[list[Tensor]], Tensor] = ds_zero.total_norm) -> Result:
    """A loop anyone would write; gradients are averaged at the boundary (local) or every micro-batch (sharded)."""
    rank, _ = world()
    model = job.build()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    params = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for step in range(job.steps):
        total: list[Tensor | None] = [None] * len(params)
        for micro in range(job.accumulation):
            loss = model(*batch(step * job.accumulation + micro, rank))
            (loss / job.accumulation).backward()
            losses.append(loss.item())
            if plan == "sharded":
                fresh = _mean([p.grad for p in params])
                total = [
                    f if t is None else t if f is None else t + f for t, f in zip(total, fresh, strict=True)
                ]
                model.zero_grad()
        if plan == "local":
            total = _mean([p.grad for p in params])
        for param, grad in zip(params, total, strict=True):
            param.grad = grad
        if job.clip is not None:
            found = norm([g for g in total if g is not None])
            norms.append(found.item())
            factor = torch.clamp(job.clip / (found + 1e-6), max=1.0)
            for grad in total:
                if grad is not None:
                    grad.mul_(factor)
        optimizer.step()
        optimizer.zero_grad()
    return Result(losses, norms, {k: v.detach().clone() for k, v in model.state_dict().items()})


def sharded(job: Job, stage: int, *, store: Any = None, **config: Any) -> Result:
    """The same with `ds_zero.shard`, written as a user would."""
    rank, _ = world()
    model = job.build()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    ds_zero.shard(
        model, optimizer, stage, config=ds_zero.ZeroConfig(param_dtype=job.dtype, **config), store=store
    )
    scaler = ds_zero.LossScaler(model, job.scale) if job.scale is not None else None
    losses, norms = [], []
    for step in range(job.steps):
        for micro in range(job.accumulation):
            loss = model(*batch(step * job.accumulation + micro, rank))
            part = loss / job.accumulation
            (part if scaler is None else scaler.scale(part)).backward()
            losses.append(loss.item())
            assert_consumed(model)
        if job.clip is not None:
            norms.append(ds_zero.clip_grad_norm_(model, job.clip).item())
        optimizer.step()
        found = ds_zero.grad_norm(model)
        if scaler is not None and job.clip is None and found is not None:
            norms.append(found.before)
        optimizer.zero_grad()
    weights = {k: v.clone() for k, v in everywhere(ds_zero.full_state_dict(model)).items()}
    overlap = ds_zero.step_overlap(model)
    ds_zero.destroy(model)
    return Result(losses, norms, weights, overlap)


def everywhere(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's dictionary on all ranks."""
    if world()[1] == 1:
        return state
    box = [state]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def assert_same(found: Result, expected: Result) -> None:
    """Bitwise."""
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert list(found.weights) == list(expected.weights)
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), (
            f"{name} differs by {(found.weights[name] - value).abs().max()}"
        )
