"""Steps parts of parameters with the inner optimizer of a `PagedOptimizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_offload.paging.paged_states import LoadedPart
from ds_offload.paging.state_layout import over
from ds_offload.paging.tensors import flat, flat_as, local


def step_parts(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    parts: Sequence[LoadedPart],
    grad_scale: Tensor | None,
    copies: Mapping[Tensor, Tensor],
) -> dict[Tensor, dict[str, Any]]:
    """Steps `parts` with an optimizer like the given one, whose parameters are views of them.

    Args:
        grad_scale: 0-dim; multiplies the gradients. None: 1.
        copies: parameter -> the tensor that receives a copy of its new values.

    Returns:
        The new states of each parameter that are no ranges of elements.
    """
    stepped, views = _over_parts(optimizer, groups, parts)
    out = _copies_of(parts, copies)
    fused: Any = getattr(stepped, "step_fused", None)
    if fused is not None and (grad_scale is not None or copies):
        scale = grad_scale if grad_scale is not None else torch.ones(())
        fused(views, grad_scale=scale, out=out)
    else:
        _step_apart(stepped, views, out, grad_scale)
    return _numbers_of(stepped, parts, views)


def sum_parts(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    parts: Sequence[LoadedPart],
    grad_scale: Tensor,
) -> tuple[Tensor, dict[Tensor, dict[str, Any]]]:
    """Calls `segment_sums` for parts that are whole. Returns its result, and states as `step_parts` does."""
    stepped, views = _over_parts(optimizer, groups, parts)
    sums: Tensor = stepped.segment_sums(views, grad_scale=grad_scale)
    return sums, _numbers_of(stepped, parts, views)


def step_summed_parts(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    parts: Sequence[LoadedPart],
    sums: Tensor,
    copies: Mapping[Tensor, Tensor],
) -> dict[Tensor, dict[str, Any]]:
    """Calls `step_segments` for parts that are whole. Returns states as `step_parts` does."""
    stepped, views = _over_parts(optimizer, groups, parts)
    stepped.step_segments(views, sums, out=_copies_of(parts, copies))
    return _numbers_of(stepped, parts, views)


def _over_parts(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], parts: Sequence[LoadedPart]
) -> tuple[Any, list[Tensor]]:
    """Returns an optimizer like the given one over views of the parts, with their states; and the views."""
    views = [_view(part) for part in parts]
    by_group: dict[int, list[Tensor]] = {}
    for part, view in zip(parts, views, strict=True):
        by_group.setdefault(part.group, []).append(view)
    made = over(optimizer, [{**groups[number], "params": members} for number, members in by_group.items()])
    _make_states_in_pages(made, parts, views)
    for part, view in zip(parts, views, strict=True):
        if part.given is not None:
            made.state[view] = {name: part.states[name] for name in part.given}
        elif part.numbers is not None:
            copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in part.numbers.items()}
            made.state[view] = {**copied, **part.states}
    return made, views


def _copies_of(parts: Sequence[LoadedPart], copies: Mapping[Tensor, Tensor]) -> list[Tensor | None]:
    return [_range_of(copies[part.param], part) if part.param in copies else None for part in parts]


def _numbers_of(
    optimizer: Optimizer, parts: Sequence[LoadedPart], views: Sequence[Tensor]
) -> dict[Tensor, dict[str, Any]]:
    return {
        part.param: _kept(part, optimizer.state[view])
        for part, view in zip(parts, views, strict=True)
        if optimizer.state[view]
    }


def _make_states_in_pages(optimizer: Any, parts: Sequence[LoadedPart], views: Sequence[Tensor]) -> None:
    """Lets an optimizer that chooses the memory of its states make new ones in the pages, without a copy."""
    allocate = getattr(optimizer, "new_state", None)
    if allocate is None:
        return
    places = {
        id(view): iter([state for name, state in part.states.items() if name not in (part.given or ())])
        for part, view in zip(parts, views, strict=True)
        if part.numbers is None or part.given is not None
    }

    def new_state(param: Tensor) -> Tensor:
        made: Tensor | None = next(places.get(id(param), iter(())), None)
        return allocate(param) if made is None else made.zero_()

    optimizer.new_state = new_state


def _step_apart(
    optimizer: Optimizer, views: Sequence[Tensor], out: Sequence[Tensor | None], grad_scale: Tensor | None
) -> None:
    """Scales, steps and copies in separate passes."""
    for view in views:
        assert view.grad is not None
        if grad_scale is not None:
            grad = view.grad.to(view.dtype)
            view.grad = grad * grad_scale.to(grad.device, grad.dtype)
        elif view.grad.dtype != view.dtype:
            view.grad = view.grad.to(view.dtype)
    optimizer.step()
    for view, copy in zip(views, out, strict=True):
        if copy is not None:
            copy.copy_(view)


def _view(part: LoadedPart) -> Tensor:
    """Returns a view of the part, with its gradient: 1-D, or with the parameter's shape if it must be whole."""
    assert part.param.grad is not None
    own = local(part.param)
    grad = flat_as(local(part.param.grad), own)[part.start : part.start + part.numel]
    view = _range_of(part.param, part)
    if part.whole:
        view, grad = own, grad.as_strided(own.size(), own.stride())
    if grad.dtype != view.dtype:
        view.grad_dtype = None  # permits a gradient of another dtype
    view.grad = grad
    return view


def _range_of(tensor: Tensor, part: LoadedPart) -> Tensor:
    return flat(local(tensor))[part.start : part.start + part.numel]


def _kept(part: LoadedPart, state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies states that the optimizer has made or replaced to the page. Returns those that are no ranges.

    Raises:
        ValueError: the optimizer keeps a state that has no place in the page.
    """
    numbers: dict[str, Any] = {}
    for name, value in state.items():
        place = part.states.get(name)
        if place is None:
            if isinstance(value, Tensor) and value.ndim > 0 and part.numel > 1:
                raise ValueError(
                    f"the optimizer has added a state {name!r} of shape {tuple(value.shape)} to a parameter of "
                    f"{part.numel} elements after its first step: set options that need further states before"
                )
            numbers[name] = value
        elif value.data_ptr() != place.data_ptr():
            place.copy_(value)
    for name in part.states.keys() - state.keys():
        part.states[name].zero_()
    return numbers
