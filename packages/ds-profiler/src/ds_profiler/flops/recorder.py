"""Counts the operations that run, and attributes each to a module.

[Note: which module an operation belongs to]
Hooks around the forward of every module keep a stack; an operation of the forward belongs to the module on top.
Autograd numbers the nodes of its graph in the order of their creation, so the nodes of one module's forward have the
numbers between those at its beginning and end. An operation of the backward belongs to the module in whose range the
number of the running node lies. No tensor is touched for it, so that in-place operations, views and modules without
tensor arguments are no special cases. Where the stack is not empty during a backward, a forward is being recomputed.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ds_profiler.flops.formulas import NONE, Formula, Formulas, Work, nothing

_clock = time.perf_counter_ns
_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the backward that runs on this thread, or -1."""
OUTSIDE = -1
"""Instead of the index of a module: outside of all."""


@dataclass
class Tally:
    """What has been counted for one module alone, without those below it."""

    forward: Work = NONE
    backward: Work = NONE
    recomputed: Work = NONE
    calls: int = 0
    forward_ns: int = 0
    """Time of its forwards, that of the modules below it included."""
    backward_ns: int = 0


@dataclass(frozen=True)
class _Running:
    """A module whose forward is running."""

    index: int
    start_ns: int
    spent_ns: int
    """What the profiler itself had taken until the start."""
    recomputing: bool


@dataclass
class Tallies:
    """The tallies of all modules, by index; `outside` for what belongs to none."""

    modules: list[Tally]
    outside: Tally = field(default_factory=Tally)

    def of(self, index: int) -> Tally:
        return self.outside if index == OUTSIDE else self.modules[index]


class Recorder:
    """Records between `start` and `stop`; after another `start` it goes on adding.

    Args:
        modules: the modules to attribute to. An index is a position in this sequence.
        formulas: of the operations.
        synchronize: waits for the accelerator where time is taken, so that times are those of the work and not of its
            launch.
    """

    def __init__(self, modules: Sequence[nn.Module], formulas: Formulas, synchronize: bool) -> None:
        self._modules = modules
        self._formulas = formulas
        self._synchronize = synchronize
        self._stack: list[_Running] = []
        self._handles: list[RemovableHandle] = []
        self._mode: _Mode | None = None
        # From which autograd sequence number on nodes belong to which module; see the note above.
        self._first_nodes: list[int] = []
        self._owners: list[int] = []
        self._spent_ns = 0
        self.tallies = Tallies([Tally() for _ in modules])

    def start(self) -> None:
        """Begins to record. Does nothing if it records already."""
        if self._mode is not None:
            return
        for index, module in enumerate(self._modules):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks; its operations belong to the module that calls it
            self._handles.append(module.register_forward_pre_hook(self._entering(index), prepend=True))
            self._handles.append(module.register_forward_hook(self._left, always_call=True))
        self._mode = _Mode(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Ends recording and removes all hooks. Does nothing if it does not record."""
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mode = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def now(self) -> int:
        """Nanoseconds, after the accelerator has done what it was given."""
        if self._synchronize:
            torch.accelerator.synchronize()
        return time.perf_counter_ns()

    def _entering(self, index: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._own_from_here(index)
            self._stack.append(_Running(index, self.now(), self._spent_ns, _in_backward()))

        return enter

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack:
            return  # recording began inside of this forward
        running = self._stack.pop()
        if not running.recomputing:
            tally = self.tallies.of(running.index)
            tally.calls += 1
            tally.forward_ns += self.now() - running.start_ns - (self._spent_ns - running.spent_ns)
        self._own_from_here(self._stack[-1].index if self._stack else OUTSIDE)

    def _own_from_here(self, index: int) -> None:
        self._first_nodes.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(index)

    def _of_running_node(self) -> int:
        node = torch._C._current_autograd_node()
        if node is None or not self._owners:
            return OUTSIDE
        at = bisect_right(self._first_nodes, node._sequence_nr()) - 1
        return self._owners[at] if at >= 0 else OUTSIDE

    def count(self, function: Any, formula: Formula, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation and counts it. Returns its result."""
        # A step has thousands of operations: nothing is called here that need not be.
        start = self.now() if self._synchronize else _clock()
        out = function(*args, **kwargs)
        end = self.now() if self._synchronize else _clock()
        work = formula(args, kwargs, out)
        if _graph_task() == -1:
            if work is not NONE:
                self.tallies.of(self._stack[-1].index if self._stack else OUTSIDE).forward += work
        elif self._stack and self._stack[-1].recomputing:
            tally = self.tallies.of(self._stack[-1].index)
            tally.recomputed += work
            tally.backward_ns += end - start
        else:
            tally = self.tallies.of(self._of_running_node())
            if work is not NONE:
                tally.backward += work
            tally.backward_ns += end - start
        self._spent_ns += _clock() - end
        return out

    def formula(self, function: Any) -> Formula | None:
        """The formula of an operation; None for a composite of others."""
        return self._formulas.of(function)


def _in_backward() -> bool:
    return _graph_task() != -1


class _Mode(TorchDispatchMode):
    """Hands every operation to a recorder."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would otherwise enter and leave a state of its compiler around every operation. Nothing is compiled
        while this mode is active.
        """
        return False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._known: dict[Any, Formula] = {}
        """Operations that have arrived before, and are no composites."""
        self._plain: set[tuple[type, ...]] = set()
        """Types of arguments that have arrived before, and are no subclasses with operations of their own."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula = self._known.get(func)
        if formula is None or tuple(types) not in self._plain:
            return self._first(func, types, args, kwargs)
        if formula is nothing and _graph_task() == -1:
            return func(
                *args, **kwargs
            )  # a view in a forward: nothing to count, and its module takes the time
        return self._recorder.count(func, formula, args, kwargs)

    def _first(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation of a kind that has not arrived before, or that never becomes known."""
        if func is _DEVICE:  # asked of fake tensors from within operations; an error there ends the process
            return func(*args)
        if types and any(issubclass(kind, torch.Tensor) and kind not in _PLAIN for kind in types):
            return (
                NotImplemented  # a subclass, such as DTensor: it runs operations on the tensors that it holds
            )
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        formula = self._recorder.formula(func)
        if formula is None:
            with self:  # without autograd, composite operations arrive in one piece
                return func.decompose(*args, **kwargs)
        self._known[func] = formula
        self._plain.add(tuple(types))
        return self._recorder.count(func, formula, args, kwargs)


_DEVICE = torch.ops.prim.device.default
_PLAIN = frozenset((torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor))
