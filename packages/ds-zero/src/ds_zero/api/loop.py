"""Functions for a training loop: clipping, `no_sync`, and `destroy`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.runtime.early_step import StepOverlap
from ds_zero.runtime.gradients.grad_scale import GradNorm
from ds_zero.runtime.gradients.norms import clip_factor
from ds_zero.runtime.gradients.param_grads import ShownGradient
from ds_zero.runtime.storage import GRAD


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`. Returns the norm before clipping, a
    0-dim fp32 CPU tensor.

    Use it instead of `torch.nn.utils.clip_grad_norm_`, which would use only the shards of one rank. Collective.

    With `max_norm` 0 or inf it only computes the norm. The norm is that of unscaled gradients, regardless of the loss
    scale. `grad_norm(model)` returns it again, together with the norm after clipping. If the optimizer has
    `step_fused`, the next `step()` applies the factor, so `shard.grad` still has unclipped values. A backward after
    clipping adds to the clipped gradients. See [Note: norm in fixed blocks] and [Note: units of a gradient].
    """
    state = _registry.state_of(model)
    if state.reducer.reduction == "none":
        raise ValueError(
            'clip_grad_norm_ with reduction="none": gradients are not reduced yet, so they have no global '
            "norm; clip in the optimizer"
        )
    pending = state.stepper.pending
    with state.comm.guard("clip_grad_norm_"):
        state.reducer.finish()
        norm = state.measure()
    factor = clip_factor(norm, max_norm)
    state.stepper.clip(factor)
    before = float(norm) if pending.norm is None else pending.norm.before
    pending.measured(GradNorm(before=before, after=float(norm * factor)))
    return norm


def grad_norm(model: nn.Module) -> GradNorm | None:
    """Returns the last computed gradient norm, before and after clipping, without the loss scale.

    `clip_grad_norm_` computes it, and so does every step of a model with a `LossScaler`. None before the first time.
    It is the same on every rank. Does not communicate.
    """
    return _registry.state_of(model).stepper.pending.last_norm


def step_overlap(model: nn.Module) -> StepOverlap:
    """Returns how often steps overlapped with the backward, and why they did not, with `ZeroConfig(overlap_step=True)`.

    On this rank; it does not communicate. The object changes as training goes on.
    """
    return _registry.state_of(model).early.report


def set_presentation(
    model: nn.Module,
    *,
    gradients: Literal["handle", "nothing", "reduced"] | None = None,
    refuse_state_dict: bool | None = None,
) -> None:
    """Sets what code that does not know ds_zero gets from a sharded model. None leaves a setting unchanged.

    Args:
        gradients: the value of `param.grad` between two backwards. "handle" (the default of `shard`): a tensor
            without memory that raises when it is used. "nothing": None, as in DeepSpeed at stages 1 to 3. "reduced":
            at stage 0, the mean over ranks as soon as it is complete, else None; the next step uses changes of it.
        refuse_state_dict: whether `model.state_dict()` raises while parameters are sharded (the default). False: it
            returns tensors without memory for these, which raise when they are read.
    """
    state = _registry.state_of(model)
    away = next((b for b in state.buckets if b.storage.is_away(GRAD)), None)
    if gradients == "reduced" and away is not None:
        raise ValueError(
            f'gradients="reduced" where {type(state.store).__name__} keeps gradients away (such as of '
            f"{away.layout.slots[0].fqn!r}): there is no tensor to show; read them by "
            "ds_zero.get_full(model, name, 'grad')"
        )
    if gradients is not None:
        state.reducer.param_grads.shown = ShownGradient(gradients)
    if refuse_state_dict is not None:
        state.refuses_state_dict = refuse_state_dict


def foreign_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Parameters whose `.grad` is neither what `set_presentation` shows nor put in its place: no step uses it.

    Meant for code that makes gradients without a backward; `set_full(model, param, "grad", value)` makes one count. No
    communication.
    """
    shown = {id(p) for p in _registry.state_of(model).reducer.param_grads.showing()}
    return [p for p in model.parameters() if p.grad is not None and id(p) not in shown]


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Context manager that defers the reduction of gradients, at any stage: backwards inside it add whole gradients
    on this rank, in fp32. The first backward outside of it, or the next step, reduces the sum.
    """
    state = _registry.state_of(model)
    state.reducer.sync_depth += 1
    try:
        yield
    finally:
        state.reducer.sync_depth -= 1


def destroy(model: nn.Module) -> None:
    """Undoes `shard`: removes its hooks, makes parameters whole on every rank with the values of the masters, and
    puts them back into the optimizer. Collective.

    Optimizer states of stages 1 to 3 are dropped, since no rank has all of them.
    """
    state = _registry.state_of(model)
    state.stepper.settle()
    state.waiting.stop()
    for handle in state.handles:
        handle.remove()
    state.reducer.param_grads.forget()
    originals: dict[int, nn.Parameter] = {}
    for bucket in state.buckets:
        state.gatherer.finish(bucket)
        for index, param in enumerate(bucket.params):
            if bucket.shards:
                originals[id(bucket.shards[index])] = param
        bucket.release_params()
        bucket.storage.settle()
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
    for bucket in state.buckets:
        bucket.storage.staging.close()
