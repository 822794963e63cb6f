"""What a training loop calls besides `optimizer.step()`: clipping, `no_sync`, and taking everything apart
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.bucket import BucketState
from ds_zero.norms import clip_factor, global_norm


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; the norm from before, a 0-dim
    fp32 CPU tensor.

    Takes the place of `torch.nn.utils.clip_grad_norm_`, which would see one rank's shards only. `max_norm` 0
    or inf measures and leaves gradients alone. With an optimizer that has `step_fused` the factor is applied
    inside the next `step()` instead of in a pass of its own, so `shard.grad` still shows unclipped values.
    Collective. See [Note: norm in fixed blocks].
    """
    state = _registry.state_of(model)
    if state.reducer.finish():
        state.stepper.grad_scale = None  # found for gradients that have changed since
    device = state.buckets[0].device if state.buckets else torch.device("cpu")
    norm = global_norm(state.grad_pieces(), state.ranks, state.norms, device)
    waiting = state.stepper.grad_scale
    if waiting is not None:  # a second call, as to log the norm after clipping, sees what the first one left
        norm = norm * waiting
    factor = clip_factor(norm, max_norm)
    if state.stepper.fused:
        state.stepper.grad_scale = factor if waiting is None else factor * waiting
    elif factor.item() != 1.0:
        with torch.no_grad():
            for bucket in state.buckets:
                for shard in bucket.shards:
                    if shard.grad is not None:
                        shard.grad.mul_(factor.to(shard.grad.device))
    return norm


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backwards inside add whole gradients locally, in fp32; the first one outside, or the next step, reduces
    them. Any stage.
    """
    state = _registry.state_of(model)
    state.reducer.sync_depth += 1
    try:
        yield
    finally:
        state.reducer.sync_depth -= 1


def destroy(model: nn.Module) -> None:
    """Undo `shard`: hooks go, every rank's parameters are whole again with the masters' values, the optimizer
    holds them again.

    Optimizer states of stage 1 and above are dropped, since no rank has them whole. Collective.
    """
    state = _registry.state_of(model)
    state.stepper.wait()
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
    state.store.close()
