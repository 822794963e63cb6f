"""Detects the end of a backward pass.

[Note: backward inside backward]
Reentrant activation checkpointing runs an inner backward inside a node of the outer one. autograd calls the callbacks
that were queued during a backward at the end of that backward. If hooks of this model run in an inner backward first
(a loss that is computed in checkpointed chunks, outside of the model's forward), the end of that backward must not be
taken for the end of the outer one. While the callbacks of an inner backward run, autograd's current node is the node of
the outer backward that contains it. So the callback registers a prehook on the successors of that node. The prehook
runs in the outer backward, and queues the callback again, for the end of that one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.autograd.variable import Variable
from torch.utils.hooks import RemovableHandle

from ds_zero.runtime.gathering.external_params import tensors_in
from ds_zero.runtime.uncompiled import opaque


def in_backward() -> bool:
    """Whether this thread is inside a backward. A forward is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


class BackwardWatch:
    """Calls its listeners at the end of the outermost backward pass in which `arm` was called."""

    def __init__(self) -> None:
        self._at_begin: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._at_end: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._at_abort: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._armed = False

    @property
    def armed(self) -> bool:
        """Whether `arm` was called in a backward that has not ended."""
        return self._armed

    def listen(
        self,
        *,
        at_begin: Sequence[Callable[[], None]] = (),
        at_end: Sequence[Callable[[], None]],
        at_abort: Sequence[Callable[[], None]],
    ) -> None:
        """Sets all listeners, once. They are bound methods, which are not kept alive.

        Args:
            at_begin: called in this order by the first `arm` in a backward.
            at_end: called in this order when the outermost backward has ended.
            at_abort: called in this order when it is detected that a backward raised.
        """
        assert not self._at_end, "listen is called once"
        self._at_begin = [weakref.WeakMethod(listener) for listener in at_begin]
        self._at_end = [weakref.WeakMethod(listener) for listener in at_end]
        self._at_abort = [weakref.WeakMethod(listener) for listener in at_abort]

    def check_abort(self) -> None:
        """Detects that the last backward raised. Called when no backward of this model can be running, such as before
        a forward outside of a backward.
        """
        if self._armed and not in_backward():
            self._armed = False
            _call(self._at_abort)

    def install(self, model: nn.Module) -> RemovableHandle:
        """Registers hooks that arm when the gradient of one of the model's outputs arrives. This happens in the
        outermost backward, before inner ones of reentrant activation checkpointing.
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
                    # Not on a parameter that the model returns: it outlives the forward, and so would the hook.
                    if tensor.requires_grad and not tensor.is_leaf:
                        tensor.register_hook(arrived)

        return model.register_forward_hook(after)

    def arm(self) -> None:
        """Has the listeners called for the backward that is running. Only valid inside a backward."""
        if self._armed:
            return
        self._armed = True
        _call(self._at_begin)
        self._call_at_end()

    def _call_at_end(self) -> None:
        """Has `_fire` called at the end of the running backward, which may be an inner one."""
        me = weakref.ref(self)

        def fire() -> None:
            watch = me()
            if watch is not None:
                watch._fire()

        Variable._execution_engine.queue_callback(fire)

    def _fire(self) -> None:
        """Called when a backward has ended. If it was an inner one, waits for the end of the outer one."""
        outer: Node | None = torch._C._current_autograd_node()
        if outer is None:
            self._armed = False
            _call(self._at_end)
        else:
            _before_next(outer, self._call_at_end)


def _before_next(node: Node, action: Callable[[], None]) -> None:
    """Has `action` called once, before the first of the nodes runs to which `node` passes gradients. `action` is a
    bound method, which is not kept alive.
    """
    pointer = weakref.WeakMethod(action)
    handles: list[RemovableHandle] = []

    def before(_: object) -> None:
        waiting = bool(handles)
        for handle in handles:
            handle.remove()
        handles.clear()
        act = pointer()
        if waiting and act is not None:
            act()

    for successor, _ in node.next_functions:
        if successor is not None:
            handles.append(successor.register_prehook(before))


def _call(listeners: list[weakref.WeakMethod[Callable[[], None]]]) -> None:
    for pointer in listeners:
        listener = pointer()
        if listener is not None:
            listener()
