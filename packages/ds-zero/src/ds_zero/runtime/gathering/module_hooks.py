"""Module hooks of stage 3: gather before a module computes, drop afterwards, in forward and in backward.

[Note: who holds a unit]
forward   from the module's pre-hook to its post-hook (which also runs when forward raises, as activation
          checkpointing does to stop a recomputation early). backward  from the first gradient of one of the
          module's outputs to the moment an earlier call takes over, or to the end of backward. Autograd runs
          nodes in the reverse order of their creation, so when the backward of a call begins, that of every
          call that began after its end is over. A module inside a unit that is held needs nothing; the same
          hooks sit on every module with parameters of its own that is called from outside its unit's forward.

Nothing is put into the graph: no node, no copy of an input, so that modules may change their inputs in place.
Other ways to a parameter: [Note: read outside] and [Note: hidden outputs].
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_zero.comm.order import OrderLog
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.external_params import (
    Listener,
    OutsideOperands,
    OutsideReads,
    Telling,
    tensors_in,
)
from ds_zero.runtime.gathering.forward_calls import Call, Calls
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.leaf_modules import tie
from ds_zero.runtime.gathering.prefetch import Limits, Recorder
from ds_zero.runtime.gathering.saved_tensors import SavedParameters
from ds_zero.runtime.gathering.unit_map import UnitMap
from ds_zero.runtime.gradients.backward import BackwardWatch, in_backward
from ds_zero.runtime.uncompiled import opaque

_ROOT = ""
_BACKWARD = ("in backward",)


class ModuleHooks:
    """Drives one model's `Gatherer` from its modules."""

    def __init__(
        self, gatherer: Gatherer, units: UnitMap, watch: BackwardWatch, limits: Limits, log: OrderLog
    ) -> None:
        self._gatherer, self._units, self._watch, self._log = gatherer, units, watch, log
        self._buckets_of = dict(units.buckets)
        self._buckets_of.setdefault(_ROOT, [])
        self._bucket_of = {id(p): b for found in units.buckets.values() for b in found for p in b.params}
        self._holes = {h.untyped_storage()._cdata for b in self._bucket_of.values() for h in b.holes}
        numel_of = {u: sum(b.layout.padded_numel for b in found) for u, found in self._buckets_of.items()}
        self._order = Recorder(numel_of, limits)
        self._saved = SavedParameters(self._bucket_of.values(), self._needed)
        self._calls = Calls(gatherer)
        self._loose: set[int] = set()
        """Buckets that were asked for while nobody held them, [Note: hidden outputs]."""
        self._asked: list[Bucket] = []
        self._idle: dict[str, list[RemovableHandle]] = {}
        """Hooks of modules inside of units, as long as they had nothing to do. The first forward with gradients
        removes them: they cost time and cut compiled graphs, and [Note: read outside] covers what comes later."""
        self._learned: set[tuple[bool, bool]] = set()
        """(training, gradients wanted) of the forwards that were watched, [Note: read outside]."""
        self._about: set[int] | None = None
        """While a forward is watched: parameters that were taken out of their modules from outside."""
        self._only_about: set[int] = set()
        """Parameters of which a watched forward took shape, dtype or device only."""
        self._keeps_all = False
        """Whether this backward builds a graph of its own, which needs the values again."""
        self._relearns = False
        self._warned = False
        self.telling = False
        watch.at_end(self._end_backward)
        watch.at_abort(self._abort)

    def install(self, model: nn.Module) -> list[RemovableHandle | Telling]:
        """Hook every unit and every module with parameters of its own; the hooks do not keep this object
        alive.
        """
        handles: list[RemovableHandle | Telling] = []
        me: weakref.ref[ModuleHooks] = weakref.ref(self)
        listener: weakref.ref[Listener] = weakref.ref(self)
        for name, module in model.named_modules():
            if name in self._buckets_of:
                handles += (made := _hook(module, name, me))
                if name != _ROOT and name not in self._units.units:
                    self._idle[name] = made
            if any(id(p) in self._bucket_of for p in module.parameters(recurse=False)):
                handles.append(Telling(module, listener))
        return handles

    # --- forward

    def enter(self, unit: str, module: nn.Module) -> Call | None:
        """Gather `unit`, start on the next ones; None if it is held already."""
        buckets = self._buckets_of[unit]
        if buckets and self._gatherer.holds(buckets):
            return None
        backward = in_backward()
        if backward:
            self._order.begin(_BACKWARD)
        elif self._calls.none_open:
            self._log.thread_id = threading.get_ident()
            grads = torch.is_grad_enabled()
            self._order.begin((unit, module.training, grads), _BACKWARD if grads else None)
        if buckets and _inside_transform():
            raise ValueError(
                f"module {unit!r} runs inside a torch.func transform (grad, vmap, ...) while its parameters are "
                "sharded: put the whole transformed call inside `with ds_zero.gathered(model.parameters()):`"
            )
        call = self._calls.begin(unit, buckets)
        self._idle.pop(unit, None)
        if buckets:
            self._log.note("recompute" if backward else "forward", unit)
            advice = self._order.enter(unit)
            call.keep = advice.keep
            self._gatherer.acquire(buckets, late=True)
            self._fetch_ahead(advice.fetch)
        self.telling = True
        return call

    def contexts(self, call: Call, training: bool) -> list[AbstractContextManager[Any]]:
        """What surrounds the forward of `call`: what watches it, and what packs the tensors it saves."""
        found: list[AbstractContextManager[Any]] = []
        if _inside_transform():
            return found
        grads = torch.is_grad_enabled()
        watched = call.unit == _ROOT and (training, grads) not in self._learned and not in_backward()
        if watched:
            self._about = set()
            found.append(OutsideReads(self._read) if grads else OutsideOperands(self._read))
        if grads and (watched or not self._loose.isdisjoint(map(id, call.buckets))):
            packing = self._saved.packing()
            if packing is not None:
                found.append(packing)
        return found

    def watched(self, training: bool) -> None:
        """The model's forward has come to its end."""
        if self._about is not None:
            self._learned.add((training, torch.is_grad_enabled()))
            self._only_about |= self._about
            self._about = None
            if torch.is_grad_enabled():
                for handles in self._idle.values():
                    for handle in handles:
                        handle.remove()
                self._idle.clear()

    def leave(self, call: Call, output: object, *, failed: bool = False) -> object:
        """The forward of `call` is over; returns its output, or what takes its place."""
        tensors = (
            tensors_in(output) if (call.buckets or call.unit == _ROOT) and not _inside_transform() else []
        )
        for tensor in tensors:
            # A parameter that is returned is read later, and not by this module.
            bucket = self._saved.bucket_of(tensor)
            if bucket is not None:
                self._hold_outside(bucket, below=call)
        if self._units.is_leaf(call.unit) and torch.is_grad_enabled():
            output = tie(output)
            tensors = tensors_in(output)
        for tensor in tensors:
            if call.buckets and tensor.requires_grad and self._saved.bucket_of(tensor) is None:
                tensor.register_hook(_on_gradient(weakref.ref(self), call))
        self._calls.end(call)
        self._gatherer.release(call.buckets, keep=call.keep)
        if self._calls.none_open:
            self.telling = False
            if failed:
                self._order.forget()
            if not in_backward():
                self._end_pass(say=True)
                if not any(t.requires_grad for t in tensors):
                    self._gatherer.drop_unused()
        return output

    # --- parameters that are read in other ways

    def _read(self, param: nn.Parameter) -> None:
        """A torch function takes values of `param`, in a forward that is watched."""
        bucket = self._bucket_of.get(id(param))
        if bucket is None or self._gatherer.holds([bucket]):
            return
        if self._about is not None:
            self._about.discard(id(param))
        self._only_about.discard(id(param))
        self._hold_outside(bucket)
        if not any(b is bucket for b in self._buckets_of[_ROOT]):
            self._buckets_of[_ROOT].append(bucket)
            self._relearns = True

    def taken(self, param: Tensor) -> None:
        """Code took `param` out of its module by name during a forward, [Note: read outside]."""
        bucket = self._bucket_of.get(id(param))
        if bucket is None or self._gatherer.holds([bucket]):
            return
        if self._about is not None:
            self._about.add(id(param))  # who really reads it is found by `_read`
        elif id(param) not in self._only_about:
            self._hold_outside(bucket)

    def replaced(self, name: str, value: object) -> None:
        """Code put another tensor in a parameter's place, as `torch.func.functional_call` does."""
        if not isinstance(value, Tensor) or id(value) in self._bucket_of:
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        if value.layout is torch.strided and value.untyped_storage()._cdata in self._holes:
            raise ValueError(
                f"the tensor given for {name!r} was taken from a parameter while that was sharded, so it holds NaN: "
                "take it, and use it, inside `with ds_zero.gathered(model.parameters()):`"
            )

    def _hold_outside(self, bucket: Bucket, below: Call | None = None) -> None:
        """Gather until the outermost forward that runs is over, and again in its backward."""
        call = self._calls.outermost
        if call is None or call is below:
            # Called from outside the model's forward: to the next step, or the next backward's end.
            self._needed(bucket)
            return
        self._log.note("outside", bucket.layout.name)
        self._gatherer.acquire([bucket])
        call.buckets.append(bucket)

    def _needed(self, bucket: Bucket) -> None:
        """Values are needed now, by a backward that nobody announced."""
        if self._gatherer.holds([bucket]):
            return
        self._log.note("unannounced", bucket.layout.name)
        self._loose.add(id(bucket))
        self._asked.append(bucket)
        self._gatherer.acquire([bucket])
        if in_backward():
            self._watch.arm()

    # --- backward

    def enter_backward(self, call: Call) -> None:
        """A gradient of one of the outputs of `call` has arrived."""
        self._watch.arm()
        self._keeps_all = self._keeps_all or torch.is_grad_enabled()
        self._order.begin(_BACKWARD)
        self._calls.take_over(call, keep_all=self._keeps_all)
        if call.buckets:
            self._log.note("backward", call.unit)
            advice = self._order.enter(call.unit)
            call.keep = advice.keep
            self._gatherer.acquire(call.buckets, late=True)
            self._fetch_ahead(advice.fetch)

    def _end_backward(self) -> None:
        keep, self._keeps_all = self._keeps_all, False
        self._calls.leave_all(keep_all=keep)
        for bucket in self._asked:
            self._gatherer.release([bucket], keep=keep)
        self._asked.clear()
        self._end_pass(say=False)
        if not keep:
            self._gatherer.drop_unused()

    def _end_pass(self, *, say: bool) -> None:
        left = self._order.end()
        if (
            self._relearns
        ):  # the model holds more units itself from now on, and those no longer run on their own
            self._relearns = False
            self._order.clear()
        elif left is not None and say and not self._warned:
            self._say_changed(left)

    def _say_changed(self, left: tuple[str, str]) -> None:
        self._warned = True
        found, expected = (repr(name) if name else "nothing more" for name in left)
        warnings.warn(
            f"modules run in another order than in the previous pass: {found} where {expected} was expected. What is "
            "gathered ahead is planned anew from each new order (said once)",
            stacklevel=2,
        )

    def _abort(self) -> None:
        self._calls.forget()
        self._asked.clear()
        self._keeps_all = False
        self._order.forget()
        self._gatherer.drop_all()

    def _fetch_ahead(self, units: Sequence[str]) -> None:
        for unit in units:
            for bucket in self._buckets_of[unit]:
                self._gatherer.start(bucket)


def _inside_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _on_gradient(owner: weakref.ref[ModuleHooks], call: Call) -> Any:
    def arrived(_: Tensor) -> None:
        hooks = owner()
        if hooks is not None and call.begins_backward():
            hooks.enter_backward(call)

    return arrived


class _Around:
    """The open calls of one module; they may nest (a module that calls itself), so they are a stack."""

    def __init__(self, module: nn.Module, unit: str, owner: weakref.ref[ModuleHooks]) -> None:
        self._module, self._unit, self._owner = weakref.ref(module), unit, owner
        self._open: list[tuple[Call | None, list[AbstractContextManager[Any]]]] = []

    @opaque
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        hooks = self._owner()
        if hooks is None:
            return
        if self._module() is not module:
            raise ValueError(
                f"this {type(module).__name__} is a copy of a module that was sharded at stage 3: it has the hooks "
                "and not the values. Copy before ds_zero.shard, or load ds_zero.full_state_dict into a new model"
            )
        call = hooks.enter(self._unit, module)
        contexts = hooks.contexts(call, module.training) if call is not None else []
        for context in contexts:
            context.__enter__()
        self._open.append((call, contexts))

    @opaque
    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> object:
        hooks = self._owner()
        if hooks is None or not self._open:  # the pre-hook raised
            return None
        call, contexts = self._open.pop()
        for context in reversed(contexts):
            context.__exit__(None, None, None)
        if call is None:
            return None
        # torch calls this hook for a forward that raises, too.
        failed = output is None and sys.exc_info()[0] is not None
        if self._unit == _ROOT and not failed:
            hooks.watched(module.training)
        replaced = hooks.leave(call, output, failed=failed)
        return replaced if replaced is not output else None


def _hook(module: nn.Module, unit: str, owner: weakref.ref[ModuleHooks]) -> list[RemovableHandle]:
    around = _Around(module, unit, owner)
    return [
        module.register_forward_pre_hook(around.before),
        module.register_forward_hook(around.after, always_call=True),
    ]
