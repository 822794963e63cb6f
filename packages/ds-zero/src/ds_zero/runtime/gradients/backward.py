"""Tells when a backward pass ends.

[Note: backward inside backward]
Reentrant activation checkpointing runs a backward of its own inside a node of the outer one, and autograd calls
the callbacks of each when that one ends. Where the inner one is the first that reaches this model (a loss that is
computed in checkpointed chunks, outside of the model's forward), its end must not be taken for the end of the
outer one. While the callbacks of an inner backward run, autograd's current node is the outer node that runs it;
a hook on that node's successors then adds the callback to the outer backward.
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
    """Whether this thread is inside a backward, where forwards are recomputations."""
    return torch._C._current_graph_task_id() != -1


class BackwardWatch:
    """Calls its listeners once when the backward pass in which `arm` was called is over, the outermost one."""

    def __init__(self) -> None:
        self._at_begin: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._at_end: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._at_abort: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._armed = False

    @property
    def armed(self) -> bool:
        """Whether a backward is running of which hooks have already seen something."""
        return self._armed

    def listen(
        self,
        *,
        at_begin: Sequence[Callable[[], None]] = (),
        at_end: Sequence[Callable[[], None]],
        at_abort: Sequence[Callable[[], None]],
    ) -> None:
        """Name all listeners, once: bound methods, which are not kept alive.

        Args:
            at_begin: called when the first hook of a backward runs.
            at_end: called in this order when the outermost backward is over.
            at_abort: called in this order when it turns out that a backward was left by an exception.
        """
        assert not self._at_end, "the listeners are named once"
        self._at_begin = [weakref.WeakMethod(listener) for listener in at_begin]
        self._at_end = [weakref.WeakMethod(listener) for listener in at_end]
        self._at_abort = [weakref.WeakMethod(listener) for listener in at_abort]

    def check_abort(self) -> None:
        """Call where no backward of this model can be running, as before a forward that is no
        recomputation.
        """
        if self._armed and not in_backward():
            self._armed = False
            _call(self._at_abort)

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
        _call(self._at_begin)
        self._call_at_end()

    def _call_at_end(self) -> None:
        """Have `_fire` called at the end of the backward that runs now, which may be an inner one."""
        me = weakref.ref(self)

        def fire() -> None:
            watch = me()
            if watch is not None:
                watch._fire()

        Variable._execution_engine.queue_callback(fire)

    def _fire(self) -> None:
        """A backward has ended; where it ran inside of another one, wait for that one."""
        outer: Node | None = torch._C._current_autograd_node()
        if outer is None:
            self._armed = False
            _call(self._at_end)
        else:
            _before_next(outer, self._call_at_end)


def _before_next(node: Node, action: Callable[[], None]) -> None:
    """Call the bound method `action`, which is not kept alive, once before the first of the nodes runs to which
    `node` passes its gradients.
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
