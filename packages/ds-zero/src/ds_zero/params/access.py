"""Reads and writes parameters, gradients and optimizer states by name: whole values, and this rank's part.

[Note: reading gradients has no effect]
In the middle of an accumulation, `get_full` of a gradient returns the gradient with which the optimizer would step if
the accumulation ended now. It does not change the accumulation: under the local plan a copy of the rank's sums is
reduced. So reading gradients does not change the bits of a training. Writing a gradient does: unreduced gradients are
reduced first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.layout.buckets import piece_of
from ds_zero.params.handle import (
    Place,
    StateKind,
    Where,
    any_rank,
    assemble,
    find,
    from_first,
    kind_of_state,
    whole_state,
)
from ds_zero.runtime.bucket import BucketState
from ds_zero.runtime.materialize import broadcast_values
from ds_zero.state import ZeroState

PARAM, GRAD = "param", "grad"


# --- whole values


def get_full(model: nn.Module | None, where: Where, kind: str = PARAM) -> Tensor | None:
    """Returns the whole value on every rank, in the parameter's shape: a copy, fp32 unless the state has another
    dtype.

    Collective: all ranks among which the parameter is sharded must call it. [Note: reading gradients has no effect]

    Args:
        model: the sharded model; None where `where` is the parameter itself.
        where: the parameter, or any of its names.
        kind: "param" (the fp32 master, or the frozen parameter), "grad" (mean over ranks of what has accumulated,
            without the loss scale, after clipping if it was clipped), or the name of an optimizer state, such as
            "exp_avg". A state with one number per parameter is returned as a 0-dim tensor.

    Returns:
        None if no rank has a value: the gradient of a frozen or unused parameter, or a state before the first step.

    Raises:
        ValueError: the model is not sharded, or does not have the name.
    """
    place = find(model, where)
    with torch.no_grad():
        _settle(place.state, kind)
        if kind == PARAM:
            return _whole_param(place)
        if place.shard is None:
            return None
        return _whole_grad(place) if kind == GRAD else whole_state(place, kind)


def set_full(model: nn.Module | None, where: Where, kind: str, value: Tensor | float | None) -> None:
    """Replaces the whole value on every rank by rank 0's `value`, in the parameter's shape. Collective.

    Other ranks may pass None. The next forward uses a new parameter, at every stage and precision. A new gradient
    replaces all gradients accumulated since the last step, and the next step uses it as it is; earlier clipping has no
    effect on it.

    Raises:
        ValueError: the shape differs; the parameter is frozen, so it has no gradient or state; or the optimizer does
            not have the state.
    """
    place = find(model, where)
    with torch.no_grad():
        _prepare_write(place, kind)
        if kind == PARAM:
            _write_param(place, from_first(place, value))
        elif kind == GRAD:
            _write_grad(place, _own(place, from_first(place, value)))
        else:
            if kind_of_state(place, kind)[0] is StateKind.ELEMENTS:
                _write_state(place, kind, _own(place, from_first(place, value)))
            else:
                _write_as_it_is(place, kind, value)
        place.state.checksums.retake([place.bucket])


def update_full_grads(
    model: nn.Module | None, params: Iterable[Where], update: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replaces whole gradients of many parameters by `update(grad, param)`, one bucket at a time. Collective.

    `update` runs on every rank with the same values and must return the same result on all of them; each rank keeps its
    part. Parameters without a gradient are skipped. `model` may be None if `params` are parameters of one model.
    """
    wanted: dict[int, list[Place]] = {}
    state = _registry.state_of(model) if model is not None else None
    for where in params:
        place = find(model, where)
        state = state or place.state
        if place.shard is not None:
            wanted.setdefault(id(place.bucket), []).append(place)
    if state is None:
        return
    with torch.no_grad():
        _complete_grads(state)
        for bucket in state.buckets:
            places = wanted.get(id(bucket), [])
            has = any_rank(
                bucket.ranks,
                [p.shard is not None and p.shard.grad is not None for p in places],
                bucket.device,
            )
            places = [p for p, has_grad in zip(places, has, strict=True) if has_grad]
            if not places:
                continue
            with bucket.storage.opened(GRAD, write=True) as grad:
                whole = grad.to(bucket.device)
                if places[0].divided:
                    sizes = bucket.layout.slice_sizes
                    whole = state.comm.gather_slices(grad, bucket.ranks, bucket.device, sizes)
                for place in places:
                    old = whole[place.slot.offset : place.slot.end].clone().view(place.slot.shape)
                    new = place.checked(update(old, bucket.params[place.index]))
                    _write_grad(place, _own(place, new))
        state.checksums.retake([b for b in state.buckets if id(b) in wanted])


# --- this rank's part


def get_local(model: nn.Module | None, where: Where, kind: str = PARAM) -> Tensor | None:
    """Returns a 1-D copy of the part of a value that this rank owns; empty if it owns nothing. Not collective.

    A gradient is complete only after `clip_grad_norm_`: while micro-batches accumulate, parts of it may be missing.
    `local_range` gives the position of the part in the parameter.

    Returns:
        None if this rank has no such value.
    """
    place = find(model, where)
    bucket, shard = place.bucket, place.shard
    with torch.no_grad():
        _settle(place.state, kind)
        if kind == PARAM:
            with bucket.storage.opened(bucket.storage.exact) as values:
                return place.joined(place.part(values)).clone()
        if kind == GRAD:
            if shard is None or (place.own.numel and not place.state.reducer.is_reduced(shard)):
                return None
            with bucket.storage.opened(GRAD) as grad:
                own = place.part(grad).to(torch.float32, copy=True)
            return own.mul_(place.state.stepper.pending.factor().to(own.device))
        held = place.held().get(kind)
        if isinstance(held, (int, float)):
            return torch.tensor(held)
        if not isinstance(held, Tensor):
            return None
        flat = shard is not None and held.shape == shard.shape and held.ndim
        return (held.detach().reshape(-1) if flat else held.detach()).clone()


def set_local(model: nn.Module | None, where: Where, kind: str, value: Tensor) -> None:
    """Replaces this rank's part. Collective: all ranks must call it; a rank that owns nothing passes an empty tensor.

    At stage 0 every rank owns everything, and rank 0's value is used.

    Raises:
        ValueError: the number of elements differs; the parameter is frozen, so it has no gradient or state; or the
            optimizer does not have the state.
    """
    place = find(model, where)
    own, bucket = place.own, place.bucket
    if value.numel() != own.numel:
        raise ValueError(
            f"{place.fqn!r}: rank {place.ranks.rank} owns {own.numel} elements from {own.start} on, but the "
            f"value has {value.numel()}: see ds_zero.local_range"
        )
    dtype = torch.float32 if bucket.trainable else bucket.dtype
    part = value.detach().reshape(-1).to(bucket.device, dtype, copy=True)
    with torch.no_grad():
        _prepare_write(place, kind)
        if not place.divided:
            broadcast_values(part, place.ranks)
        if kind == GRAD:
            _write_grad(place, part)
        elif kind == PARAM:
            _write_param(place, assemble(place, part))
        elif kind_of_state(place, kind)[0] is StateKind.ELEMENTS:
            _write_state(place, kind, part)
        else:
            raise ValueError(f"state {kind!r} of {place.fqn!r} is not element-wise: use ds_zero.set_full")
        place.state.checksums.retake([place.bucket])


def local_range(model: nn.Module | None, where: Where) -> tuple[int, int]:
    """Returns the range of the flattened parameter that this rank owns: (first element, number of elements)."""
    own = find(model, where).own
    return own.start, own.numel


# --- reading


def _whole_param(place: Place) -> Tensor:
    bucket, slot = place.bucket, place.slot
    if not bucket.trainable and bucket.whole:  # every rank has it whole; ranks own slices only for saving
        return bucket.full[slot.offset : slot.end].clone().view(slot.shape).float()
    with bucket.storage.opened(bucket.storage.exact) as values:
        return assemble(place, place.joined(place.part(values)).to(bucket.device))


def _whole_grad(place: Place) -> Tensor | None:
    shard, bucket, reducer = place.shard, place.bucket, place.state.reducer
    if shard is None:
        return None
    [has] = any_rank(place.ranks, [reducer.has_grad(bucket.params[place.index], shard)], bucket.device)
    if not has:
        return None
    unreduced, reduced = reducer.preview(bucket)
    piece = piece_of(place.slot, *bucket.slice_range)
    mine = slice(piece.offset, piece.offset + piece.numel)
    own = torch.zeros(piece.numel, dtype=torch.float32, device=bucket.device)
    if reducer.is_reduced(shard):
        own += reduced[mine].to(bucket.device)
    if unreduced is not None:
        own += unreduced[mine]
    whole = assemble(place, own, slices=True)
    return whole.mul_(place.state.stepper.pending.factor().to(whole.device))


# --- writing


def _own(place: Place, whole: Tensor) -> Tensor:
    own = place.own
    return whole.reshape(-1)[own.start : own.start + own.numel]


def _settle(state: ZeroState, kind: str) -> None:
    """Waits for updated parameters. If masters or states are accessed, takes early updates of them back."""
    if kind != GRAD:
        state.stepper.settle()
    state.stepper.wait()


def _prepare_write(place: Place, kind: str) -> None:
    _settle(place.state, kind)
    if kind != PARAM and place.shard is None:
        raise ValueError(f"{place.fqn!r} is frozen: it is in no optimizer group, so it has no {kind!r}")
    if kind == GRAD:
        _complete_grads(place.state)


def _complete_grads(state: ZeroState) -> None:
    """Reduces unreduced gradients, and applies clipping and the loss scale to them in place."""
    state.reducer.finish()
    state.stepper.apply_pending()
    state.stepper.pending.norm = None  # the caller changes gradients, so their norm is unknown


def _write_param(place: Place, whole: Tensor) -> None:
    bucket, slot = place.bucket, place.slot
    if bucket.state in (BucketState.GATHERING, BucketState.GATHERED):
        place.state.gatherer.finish(bucket)
    own = _own(place, whole)
    place.write_master_bits(own)
    for kind in dict.fromkeys((bucket.storage.exact, PARAM)):
        with bucket.storage.opened(kind, write=True) as values:
            place.part(values).copy_(place.narrowed(own))
    if bucket.state in (BucketState.WHOLE, BucketState.GATHERED):
        bucket.full[slot.offset : slot.end].copy_(place.narrowed(whole.reshape(-1)))


def _write_grad(place: Place, own: Tensor) -> None:
    bucket, shard = place.bucket, place.shard
    assert shard is not None
    with bucket.storage.opened(GRAD, write=True) as grad:
        place.part(grad).copy_(own)
    if place.own.numel:
        shard.grad = bucket.storage.grads[place.index]
    place.state.reducer.keep(bucket.params[place.index])


def _write_state(place: Place, kind: str, own: Tensor) -> None:
    with place.states_opened():
        held = place.held().get(kind)
        if isinstance(held, Tensor) and held.numel():
            held.copy_(own.view_as(held))


def _write_as_it_is(place: Place, kind: str, value: Tensor | float | None) -> None:
    """Writes a state that is a number, or a tensor of another shape than the parameter: rank 0's value."""
    old = whole_state(place, kind)
    assert old is not None
    if place.ranks.first and (value is None or (isinstance(value, Tensor) and value.shape != old.shape)):
        raise ValueError(
            f"state {kind!r} of {place.fqn!r} has shape {tuple(old.shape)}: rank 0 was given {value!r}"
        )
    if place.ranks.first:
        old = torch.as_tensor(value).to(old)
    broadcast_values(old, place.ranks)
    with place.states_opened():
        held = place.held()
        mine = held.get(kind)  # None on a rank that owns no part of this parameter
        if isinstance(mine, Tensor):
            mine.copy_(old.view_as(mine))
        elif isinstance(mine, (int, float)):
            held[kind] = type(mine)(old.item())
