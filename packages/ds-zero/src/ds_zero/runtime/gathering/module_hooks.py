"""Module hooks of stage 3, which drive `UnitGathering` in an ordinary training loop.

Hooks report when the forward of a module begins and ends, and when its backward begins; [Note: lifetime of a gathered
unit] in `unit_gathering.py` describes what follows from that. The hooks add no node to the autograd graph and copy no
input, so modules may change their inputs in place. Three objects detect parameters that are read in other ways:

WatchedForwards    reads by any operation, in the first forward of each mode           [Note: external parameters]
NamedReads         reads by name from other modules, in every forward                  [Note: external parameters]
SavedParameters    reads in backwards that are not reported, by saved tensors          [Note: unreported backwards]
"""

from __future__ import annotations

import sys
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_zero.runtime.gathering.external_params import Listener, ParameterReadHook, tensors_in
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
        """Hooks of modules inside of units that have never gathered anything. The end of the first forward with
        gradients removes them, since they take time and break compiled graphs. If such a module is later called from
        outside its unit, [Note: external parameters] detects it."""

    def install(self, model: nn.Module) -> list[RemovableHandle | ParameterReadHook]:
        """Registers hooks on every unit and every module with sharded parameters of its own. The hooks do not keep this
        object alive.
        """
        handles: list[RemovableHandle | ParameterReadHook] = []
        me = weakref.ref(self)
        listener: weakref.ref[Listener] = weakref.ref(self._names)
        for name, module in model.named_modules():
            if name in self._gathering.units:
                handles += (made := _hook(module, name, me))
                if name != ROOT and name not in self._units.units:
                    self._idle[name] = made
            if any(self._gathering.bucket_of(p) is not None for p in module.parameters(recurse=False)):
                handles.append(ParameterReadHook(module, listener))
        return handles

    def enter(self, unit: str, training: bool) -> tuple[Call | None, list[AbstractContextManager[Any]]]:
        """Called when the forward of `unit` begins.

        Returns:
            The call, or None if the unit is already gathered for another call, and the context managers in which the
            forward must run.
        """
        call = self._gathering.enter(unit, training=training)
        if call is None:
            return None, []
        self._idle.pop(unit, None)
        self._names.listening = True
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
        """Called when the forward of `call` has ended. Returns its output, or a replacement of it."""
        if call.unit == ROOT and not failed and self._forwards.active:
            self._forwards.end(training=training)
            if torch.is_grad_enabled():
                self._remove_idle()
        examined = (call.buckets or call.unit == ROOT) and not inside_transform()
        tensors = tensors_in(output) if examined else []
        for tensor in tensors:
            # The caller may read a returned parameter after this module has ended.
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
            self._names.listening = False
        return output

    def enter_backward(self, call: Call) -> None:
        """Called when the first gradient of an output of `call` has been computed."""
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
    """The two forward hooks of one module, with a stack of its running calls (a module may call itself)."""

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
                f"this {type(module).__name__} is a copy of a module that was sharded at stage 3: it has the hooks, "
                "but not the values. Copy before ds_zero.shard, or load ds_zero.full_state_dict into a new model"
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
        # torch also calls this hook after a forward that raised.
        failed = output is None and sys.exc_info()[0] is not None
        replaced = hooks.leave(call, output, training=module.training, failed=failed)
        return replaced if replaced is not output else None


def _hook(module: nn.Module, unit: str, owner: weakref.ref[ModuleHooks]) -> list[RemovableHandle]:
    around = _Around(module, unit, owner)
    return [
        module.register_forward_pre_hook(around.before),
        module.register_forward_hook(around.after, always_call=True),
    ]
