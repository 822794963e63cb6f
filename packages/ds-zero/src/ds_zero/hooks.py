"""Module hooks of stage 3: gather before a module computes, drop afterwards, in forward and in backward.

[Note: who holds a unit]
forward   from the module's pre-hook to its post-hook (which also runs when forward raises, as activation
          checkpointing does to stop a recomputation early). backward  from the first gradient of one of the
          module's outputs to the moment all its inputs have theirs; where no input needs a gradient, to the
          end of backward. A module inside a unit that is held needs nothing; the same hooks sit on every
          module with parameters of its own, so that a module called from outside its unit's forward still
          finds its values.

[Note: read outside]
A parameter that another module reads (`F.linear(x, self.embed.weight)` in the model's forward) has no hook of
its own. The first forward in each mode watches all torch functions; such a parameter is gathered when it is
first read, and from then on the model itself holds it, from the beginning of its forward to the end, and
again while backward runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ds_zero.backward import BackwardWatch
from ds_zero.bucket import Bucket
from ds_zero.gather import Gatherer
from ds_zero.outside import OutsideReads, tensors_in
from ds_zero.prefetch import Order

_ROOT = ""


class _Call:
    """One forward call of a unit, and its later backward."""

    def __init__(self, hooks: ModuleHooks, unit: str, buckets: list[Bucket]) -> None:
        self._hooks, self.unit, self.buckets = weakref.ref(hooks), unit, list(buckets)
        self.holds = False

    def before_backward(self, _: Tensor) -> None:
        hooks = self._hooks()
        if hooks is not None and not self.holds:
            self.holds = True
            hooks.enter_backward(self)

    def after_backward(self) -> None:
        hooks = self._hooks()
        if hooks is not None and self.holds:
            self.holds = False
            hooks.leave_backward(self)


class _AfterBackward(torch.autograd.Function):
    """Identity on a unit's inputs, whose backward runs when everything behind them has run: it was recorded
    before all of it.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.after_backward()
        return (None, *grads)


class ModuleHooks:
    """Drives one model's `Gatherer` from its modules."""

    def __init__(
        self, gatherer: Gatherer, buckets_of: dict[str, list[Bucket]], watch: BackwardWatch, prefetch: bool
    ) -> None:
        self._gatherer, self._buckets_of, self._watch, self._prefetch = gatherer, buckets_of, watch, prefetch
        self._forward, self._backward = Order(), Order()
        self._held: list[_Call] = []
        self._bucket_of = {id(p): b for found in buckets_of.values() for b in found for p in b.params}
        self._buckets_of.setdefault(_ROOT, [])
        self._learned: set[tuple[bool, bool]] = set()
        """(training, gradients wanted) of the forwards that were watched, [Note: read outside]."""
        watch.at_end(self._end_backward)
        watch.at_abort(self._abort)

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook every unit and every module with parameters of its own; the hooks do not keep this object
        alive.
        """
        handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if name in self._buckets_of:
                handles += _hook(module, name, weakref.ref(self))
        me = weakref.ref(self)

        def end_of_forward(*_: object) -> None:
            hooks = me()
            if hooks is not None and not hooks._watch.armed:
                hooks._forward.end()

        handles.append(model.register_forward_hook(end_of_forward, always_call=True))
        return handles

    # --- forward

    def enter(self, unit: str) -> _Call | None:
        """Gather `unit`, start on the next one; None if it is held already."""
        buckets = self._buckets_of[unit]
        if buckets and self._gatherer.holds(buckets):
            return None
        self._gatherer.acquire(buckets)
        if (
            buckets and not self._watch.armed
        ):  # a recomputation inside backward is not part of the forward order
            self._fetch_ahead(self._forward.enter(unit))
        return _Call(self, unit, buckets)

    def watch(self, call: _Call, training: bool) -> OutsideReads | None:
        """What finds the parameters that are read outside their module while `call`, the model's own, runs;
        None where a forward of this kind has shown them. [Note: read outside]
        """
        kind = (training, torch.is_grad_enabled())
        if kind in self._learned or self._watch.armed:
            return None
        me = weakref.ref(self)

        def read(param: nn.Parameter) -> None:
            hooks = me()
            bucket = hooks._bucket_of.get(id(param)) if hooks is not None else None
            if hooks is not None and bucket is not None and not hooks._gatherer.holds([bucket]):
                hooks._gatherer.acquire([bucket])
                call.buckets.append(bucket)
                if not any(b is bucket for b in hooks._buckets_of[_ROOT]):
                    hooks._buckets_of[_ROOT].append(bucket)

        return OutsideReads(read)

    def watched(self, training: bool) -> None:
        """A forward has been watched to its end."""
        self._learned.add((training, torch.is_grad_enabled()))

    def leave(self, call: _Call, output: object) -> None:
        tracked = [t for t in tensors_in(output) if t.requires_grad] if call.buckets else []
        for tensor in tracked:
            tensor.register_hook(call.before_backward)
        # The last unit's backward comes next: dropping it would only fetch it again.
        keep = bool(tracked) and self._forward.is_last(call.unit)
        self._gatherer.release(call.buckets, keep=keep)

    # --- backward

    def enter_backward(self, call: _Call) -> None:
        self._watch.arm()
        self._held.append(call)
        self._gatherer.acquire(call.buckets)
        self._fetch_ahead(self._backward.enter(call.unit))

    def leave_backward(self, call: _Call) -> None:
        self._held.remove(call)
        self._gatherer.release(call.buckets)

    def _end_backward(self) -> None:
        for call in list(self._held):
            call.after_backward()
        self._backward.end()
        self._forward.end()
        self._gatherer.drop_unused()

    def _abort(self) -> None:
        for call in self._held:
            call.holds = False
        self._held.clear()
        self._backward.end()
        self._gatherer.drop_all()

    def _fetch_ahead(self, unit: str | None) -> None:
        if self._prefetch and unit is not None:
            for bucket in self._buckets_of[unit]:
                self._gatherer.start(bucket)


def _hook(module: nn.Module, unit: str, owner: weakref.ref[ModuleHooks]) -> Sequence[RemovableHandle]:
    """Forward hooks of one module; calls may nest (a module that calls itself), so open calls are a stack."""
    open_calls: list[_Call | None] = []
    open_watches: list[OutsideReads | None] = []
    original = weakref.ref(module)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hooks = owner()
        if hooks is not None and original() is not module:
            raise ValueError(
                f"this {type(module).__name__} is a copy of a module that was sharded at stage 3: it has the hooks "
                "and not the values. Copy before ds_zero.shard, or load ds_zero.full_state_dict into a new model"
            )
        call = hooks.enter(unit) if hooks is not None else None
        open_calls.append(call)
        if unit == _ROOT:
            found = hooks.watch(call, module.training) if hooks is not None and call is not None else None
            open_watches.append(found)
            if found is not None:
                found.__enter__()  # type: ignore[no-untyped-call]
        if call is None or not call.buckets or not torch.is_grad_enabled():
            return None
        flat, spec = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        if not places:
            return None
        for i, tensor in zip(places, _AfterBackward.apply(call, *(flat[i] for i in places)), strict=True):  # type: ignore[no-untyped-call]
            flat[i] = tensor
        new: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(flat, spec)
        return new

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        call = open_calls.pop() if open_calls else None
        hooks = owner()
        found = open_watches.pop() if open_watches else None
        if found is not None:
            found.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if hooks is not None and output is not None:
                hooks.watched(module.training)
        if call is not None and hooks is not None:
            hooks.leave(call, output)

    return (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    )
