"""What a training loop calls besides `optimizer.step()`: clipping, `no_sync`, and taking everything apart
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.runtime.bucket import BucketState
from ds_zero.runtime.gradients.grad_scale import GradNorm
from ds_zero.runtime.gradients.norms import clip_factor


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Returns the norm before, a 0-dim fp32 CPU
    tensor.

    Replaces `torch.nn.utils.clip_grad_norm_`, which sees the shards of one rank only. Collective.

    With `max_norm` 0 or inf it only computes the norm. The norm is that of unscaled gradients, whatever the loss scale.
    `grad_norm(model)` returns it again, with the norm after clipping. If the optimizer has `step_fused`, the next
    `step()` applies the factor, so `shard.grad` still has unclipped values. A backward after clipping adds to the
    clipped gradients. See [Note: norm in fixed blocks] and [Note: units of a gradient].
    """
    state = _registry.state_of(model)
    if state.reducer.reduction == "none":
        raise ValueError(
            'clip_grad_norm_ with reduction="none": each rank has gradients of its own, which have no common norm '
            "before the optimizer reduces them; clip in the optimizer"
        )
    pending = state.stepper.pending
    with state.comm.guard("clip_grad_norm_"):
        state.reducer.finish()
        norm = state.measure()
    factor = clip_factor(norm, max_norm)
    state.stepper.clip(factor)
    before = float(norm) if pending.norm is None else pending.norm.before
    pending.found(GradNorm(before=before, after=float(norm * factor)))
    return norm


def grad_norm(model: nn.Module) -> GradNorm | None:
    """The last computed gradient norm, before and after clipping, without the loss scale.

    `clip_grad_norm_` computes it, and so does every step of a model with a `LossScaler`; None before the first time. It
    is the same on every rank. No communication.
    """
    return _registry.state_of(model).stepper.pending.last_norm


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Defer the reduction of gradients, at any stage: backwards inside the context add whole gradients on this rank, in
    fp32. The first backward outside it, or the next step, reduces the sum.
    """
    state = _registry.state_of(model)
    state.reducer.sync_depth += 1
    try:
        yield
    finally:
        state.reducer.sync_depth -= 1


def destroy(model: nn.Module) -> None:
    """Undo `shard`: remove its hooks, make parameters whole on every rank with the masters' values, and put them back
    into the optimizer. Collective.

    Optimizer states of stage 1 and above are dropped, since no rank has all of them.
    """
    state = _registry.state_of(model)
    state.stepper.wait()
    state.waiting.stop()
    for handle in state.handles:
        handle.remove()
    originals: dict[int, nn.Parameter] = {}
    for bucket in state.buckets:
        state.gatherer.finish(bucket)
        for index, param in enumerate(bucket.params):
            param.data = bucket.views[index].clone()
            if bucket.shards:
                originals[id(bucket.shards[index])] = param
        bucket.state = BucketState.WHOLE
    optimizer = state.optimizer() if state.optimizer is not None else None
    parts: list[nn.Parameter | torch.optim.Optimizer] = [p for b in state.buckets for p in b.params]
    if optimizer is not None:
        parts.append(optimizer)
        for group in optimizer.param_groups:
            group["params"] = [originals[id(entry)] for entry in group["params"]]
        optimizer.state.clear()
    _registry.drop(model, parts)
    state.scaler = None
    state.store.close()
