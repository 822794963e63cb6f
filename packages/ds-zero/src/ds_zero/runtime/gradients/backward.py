"""Tells when a backward pass ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils.hooks import RemovableHandle

from ds_zero.runtime.gathering.external_params import tensors_in
from ds_zero.runtime.uncompiled import opaque


def in_backward() -> bool:
    """Whether this thread is inside a backward, where forwards are recomputations."""
    return torch._C._current_graph_task_id() != -1


class BackwardWatch:
    """Calls its listeners once when the backward pass in which `arm` was called is over, the outermost one."""

    def __init__(self) -> None:
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._undoers: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._armed = False

    @property
    def armed(self) -> bool:
        """Whether a backward is running of which hooks have already seen something."""
        return self._armed

    def at_end(self, listener: Callable[[], None]) -> None:
        """Call the bound method `listener` at the end; listeners run in the order in which they were added
        and are not kept alive.
        """
        self._listeners.append(weakref.WeakMethod(listener))

    def at_abort(self, listener: Callable[[], None]) -> None:
        """Call the bound method `listener` when it turns out that a backward was left by an exception."""
        self._undoers.append(weakref.WeakMethod(listener))

    def check_abort(self) -> None:
        """Call where no backward of this model can be running, as before a forward that is no
        recomputation.
        """
        if self._armed and not in_backward():
            self._armed = False
            _call(self._undoers)

    def install(self, model: nn.Module) -> RemovableHandle:
        """Arm when the gradient of one of the model's outputs arrives: that is in the outermost backward, where
        reentrant activation checkpointing runs others inside.
        """
        me = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            watch = me()
            if watch is not None:
                watch.arm()

        @opaque
        def after(_: nn.Module, __: object, output: object) -> None:
            if torch.is_grad_enabled() and not in_backward():
                for tensor in tensors_in(output):
                    # A parameter that is returned as it is outlives the forward, and with it a hook on it.
                    if tensor.requires_grad and not tensor.is_leaf:
                        tensor.register_hook(arrived)

        return model.register_forward_hook(after)

    def arm(self) -> None:
        """Only valid inside a backward pass."""
        if self._armed:
            return
        self._armed = True
        me = weakref.ref(self)

        def fire() -> None:
            watch = me()
            if watch is not None:
                watch._fire()

        Variable._execution_engine.queue_callback(fire)

    def _fire(self) -> None:
        self._armed = False
        _call(self._listeners)


def _call(listeners: list[weakref.WeakMethod[Callable[[], None]]]) -> None:
    for pointer in listeners:
        listener = pointer()
        if listener is not None:
            listener()
