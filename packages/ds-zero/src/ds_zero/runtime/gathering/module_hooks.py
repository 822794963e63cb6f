"""Module hooks of stage 3: the driver of `UnitGathering` in an ordinary loop.

Hooks report when the forward of a module begins and ends, and when its backward begins; [Note: who holds a unit] in
`unit_gathering.py` says what follows from that. Nothing is put into the graph: no node, no copy of an input, so that
modules may change their inputs in place. Parameters that are read in other ways are found by three objects:

WatchedForwards    the first forward in each mode, watched operation by operation   [Note: read outside]
NamedReads         parameters that are taken out of their modules by name           [Note: read outside]
SavedParameters    tensors saved for a backward that no module announces            [Note: hidden outputs]
"""

from __future__ import annotations

import sys
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_zero.runtime.gathering.external_params import Listener, Telling, tensors_in
from ds_zero.runtime.gathering.forward_calls import Call
from ds_zero.runtime.gathering.leaf_modules import tie
from ds_zero.runtime.gathering.named_reads import NamedReads
from ds_zero.runtime.gathering.saved_tensors import SavedParameters
from ds_zero.runtime.gathering.unit_gathering import ROOT, UnitGathering, inside_transform
from ds_zero.runtime.gathering.unit_map import UnitMap
from ds_zero.runtime.gathering.watched_forwards import WatchedForwards
from ds_zero.runtime.gradients.backward import BackwardWatch, in_backward
from ds_zero.runtime.uncompiled import opaque


class ModuleHooks:
    """Reports the forwards and backwards of one model's modules to its `UnitGathering`."""

    def __init__(self, gathering: UnitGathering, units: UnitMap, watch: BackwardWatch) -> None:
        self._gathering, self._units, self._watch = gathering, units, watch
        self._forwards = WatchedForwards(gathering)
        self._names = NamedReads(gathering, self._forwards)
        self._saved = SavedParameters(gathering, watch)
        self._idle: dict[str, list[RemovableHandle]] = {}
        """Hooks of modules inside of units, as long as they had nothing to do. The first forward with gradients
        removes them: they cost time and cut compiled graphs, and [Note: read outside] covers what comes later."""

    def install(self, model: nn.Module) -> list[RemovableHandle | Telling]:
        """Hook every unit and every module with parameters of its own; the hooks do not keep this object
        alive.
        """
        handles: list[RemovableHandle | Telling] = []
        me = weakref.ref(self)
        listener: weakref.ref[Listener] = weakref.ref(self._names)
        for name, module in model.named_modules():
            if name in self._gathering.units:
                handles += (made := _hook(module, name, me))
                if name != ROOT and name not in self._units.units:
                    self._idle[name] = made
            if any(self._gathering.bucket_of(p) is not None for p in module.parameters(recurse=False)):
                handles.append(Telling(module, listener))
        return handles

    def enter(self, unit: str, training: bool) -> tuple[Call | None, list[AbstractContextManager[Any]]]:
        """The forward of `unit` begins.

        Returns:
            Its call, None if the unit is held already, and the contexts in which the forward has to run.
        """
        call = self._gathering.enter(unit, training=training)
        if call is None:
            return None, []
        self._idle.pop(unit, None)
        self._names.telling = True
        return call, self._contexts(call, training)

    def _contexts(self, call: Call, training: bool) -> list[AbstractContextManager[Any]]:
        if inside_transform():
            return []
        contexts: list[AbstractContextManager[Any]] = []
        grads = torch.is_grad_enabled()
        watched = call.unit == ROOT and not in_backward() and self._forwards.is_due(training=training)
        if watched:
            contexts.append(self._forwards.begin())
        if grads and (watched or self._gathering.has_hidden_backward(call)):
            packing = self._saved.packing()
            if packing is not None:
                contexts.append(packing)
        return contexts

    def leave(self, call: Call, output: object, *, training: bool, failed: bool) -> object:
        """The forward of `call` is over; returns its output, or what takes its place."""
        if call.unit == ROOT and not failed and self._forwards.active:
            self._forwards.end(training=training)
            if torch.is_grad_enabled():
                self._remove_idle()
        looked_at = (call.buckets or call.unit == ROOT) and not inside_transform()
        tensors = tensors_in(output) if looked_at else []
        for tensor in tensors:
            # A parameter that is returned is read later, and not by this module.
            bucket = self._saved.bucket_of(tensor)
            if bucket is not None:
                self._gathering.hold_for_forward(bucket, below=call)
                if in_backward():
                    self._watch.arm()
        if self._units.is_leaf(call.unit) and torch.is_grad_enabled():
            output = tie(output)
            tensors = tensors_in(output)
        for tensor in tensors:
            if call.buckets and tensor.requires_grad and self._saved.bucket_of(tensor) is None:
                tensor.register_hook(_on_gradient(weakref.ref(self), call))
        self._gathering.leave(call, failed=failed, has_backward=any(t.requires_grad for t in tensors))
        if self._gathering.none_open:
            self._names.telling = False
        return output

    def enter_backward(self, call: Call) -> None:
        """A gradient of one of the outputs of `call` has arrived."""
        self._watch.arm()
        self._gathering.enter_backward(call)

    def _remove_idle(self) -> None:
        for handles in self._idle.values():
            for handle in handles:
                handle.remove()
        self._idle.clear()


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
        call, contexts = hooks.enter(self._unit, module.training)
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
        replaced = hooks.leave(call, output, training=module.training, failed=failed)
        return replaced if replaced is not output else None


def _hook(module: nn.Module, unit: str, owner: weakref.ref[ModuleHooks]) -> list[RemovableHandle]:
    around = _Around(module, unit, owner)
    return [
        module.register_forward_pre_hook(around.before),
        module.register_forward_hook(around.after, always_call=True),
    ]
