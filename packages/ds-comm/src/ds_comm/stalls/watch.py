"""Watches the collectives of torch.distributed on a rank, and reports when ranks wait too long for each other.

[Note: stall reports]
Every rank remembers its last collectives of each group. A thread of every rank looks a few times per `timeout_s`. If
its rank has been in one collective for longer than that, it asks through the store of the process group, and the thread
of every rank answers with its position: the collectives it remembers, and the line that it runs. When all have
answered, or after `ANSWER_S`, one of the ranks that asked compares the positions and logs what it finds. Nothing is
sent while no rank waits. Threads answer although their rank is blocked, because torch's collectives release the
interpreter's lock.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore

from ds_comm.stalls.calls import KEPT, Call, Position
from ds_comm.stalls.explain import explain
from ds_comm.torch_functions import OPERATIONS, WrappedFunctions, group_among

ANSWER_S = 3.0
"""Seconds that ranks have to answer."""
_SAME_SHAPES = frozenset(
    (
        "all_reduce",
        "broadcast",
        "reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )
)
"""Collectives to which all ranks pass tensors of the same shapes."""
_MESSAGES = frozenset(("send", "recv", "batch_isend_irecv"))
"""Not collectives: ranks call them differently, so they are not compared."""

_log = logging.getLogger("ds_comm")


class StallWatch:
    """See `watch_stalls`."""

    def __init__(self, model: nn.Module | None, timeout_s: float, report: Callable[[str], None]) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._timeout_s, self._report = timeout_s, report
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store = PrefixStore("ds_comm.stalls", dist.distributed_c10d._get_default_store())
        self._main = threading.get_ident()
        self._calls: dict[str, deque[Call]] = {}
        self._counts: dict[str, int] = {}
        self._running: tuple[str, float] | None = None
        """Group of the collective that runs now, and when it began."""
        self._asked = 0
        """Number of the last question that this rank has answered or asked."""
        self._reported: tuple[str, int] | None = None
        """Group and number of the collective that this rank has asked about."""
        self._stopped = threading.Event()
        self._functions = WrappedFunctions((n for n in OPERATIONS if n not in _MESSAGES), self._wrapped)
        self._thread = threading.Thread(target=self._look_repeatedly, name="ds_comm.stalls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch. Safe to call twice."""
        self._stopped.set()
        self._functions.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> StallWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on the thread that trains

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Only the outermost call of the thread that trains: torch's functions call each other.
            if self._running is not None or threading.get_ident() != self._main or self._stopped.is_set():
                return function(*args, **kwargs)
            group = _members((*args, *kwargs.values()))
            if group is None:
                return function(*args, **kwargs)
            self._note(name, group, (*args, *kwargs.values()))
            try:
                return function(*args, **kwargs)
            finally:
                self._running = None

        return call

    def _note(self, name: str, group: str, arguments: Sequence[Any]) -> None:
        number = self._counts.get(group, 0)
        self._counts[group] = number + 1
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        shown = tuple(_text(tensor) for tensor in tensors) if name in _SAME_SHAPES else ()
        call = Call(
            number=number, name=name, tensors=shown, site=_site(sys._getframe(2)), subject=self._name(tensors)
        )
        self._calls.setdefault(group, deque(maxlen=KEPT)).append(call)
        self._running = (group, time.monotonic())

    def _name(self, tensors: Sequence[Tensor]) -> str:
        model = None if self._model is None else self._model()
        if model is None:
            return ""
        wanted = {id(tensor) for tensor in tensors}
        for name, param in model.named_parameters():
            if id(param) in wanted:
                return name
            if param.grad is not None and id(param.grad) in wanted:
                return f"the gradient of {name}"
        return ""

    # --- on the thread that watches

    def _look_repeatedly(self) -> None:
        while not self._stopped.wait(min(self._timeout_s / 4, 1.0)):
            try:
                self._look()
            except (RuntimeError, dist.DistStoreError) as error:  # the store's process has ended
                _log.debug("the watch for stalls ends: %s", error)
                return

    def _look(self) -> None:
        question = int(self._store.add("questions", 0))
        if question > self._asked:
            self._asked = question
            self._store.set(f"{question}/{self._rank}", self._position().to_json())
        running = self._running
        if running is None or time.monotonic() - running[1] < self._timeout_s:
            return
        stalled = (running[0], self._counts[running[0]])
        if stalled != self._reported:
            self._reported = stalled
            self._ask()

    def _ask(self) -> None:
        question = int(self._store.add("questions", 1))
        self._asked = question
        self._store.set(f"{question}/{self._rank}", self._position().to_json())
        deadline = time.monotonic() + ANSWER_S
        missing = set(range(self._size))
        while missing and time.monotonic() < deadline and not self._stopped.is_set():
            missing -= {rank for rank in missing if self._store.check([f"{question}/{rank}"])}
            time.sleep(0.05)
        # Several ranks wait, and ask at about the same time: one of them reports.
        if int(self._store.add(f"reported/{self._reported}", 1)) != 1:
            return
        answered = sorted(set(range(self._size)) - missing)
        positions = {
            rank: Position.from_json(self._store.get(f"{question}/{rank}").decode()) for rank in answered
        }
        self._report(explain(positions, sorted(missing)))

    def _position(self) -> Position:
        running = self._running
        return Position(
            rank=self._rank,
            place=_site(sys._current_frames().get(self._main)),
            calls={group: tuple(calls) for group, calls in list(self._calls.items())},
            waits_in=None if running is None else running[0],
            waited_s=0.0 if running is None else time.monotonic() - running[1],
        )


def watch_stalls(
    model: nn.Module | None = None, *, timeout_s: float = 30.0, report: Callable[[str], None] = _log.error
) -> StallWatch:
    """Reports why ranks wait for each other, if one is in a collective of torch.distributed for longer than
    `timeout_s`: which rank has not called it and where it is, or which ranks pass other shapes or call another
    collective. Works with any training loop; a context manager, or `close` ends it. All ranks must call it.

    It only reports: the wait ends by torch's own timeout. Code that has imported a function by its name before is not
    seen, and messages (send, recv) are not compared.

    Args:
        model: whose parameters and gradients are named in the report.
        timeout_s: seconds; the report follows within about 4 s.
        report: called with the text, on one rank. Default: logs it.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s}: give seconds above 0")
    return StallWatch(model, timeout_s, report)


def _members(arguments: Sequence[Any]) -> str | None:
    """The ranks of the group among the arguments as text; None if this rank is not in it."""
    given = group_among(arguments)
    if given is dist.GroupMember.NON_GROUP_MEMBER or not dist.is_initialized():
        return None
    return ",".join(map(str, dist.get_process_group_ranks(given)))


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _site(frame: types.FrameType | None) -> str:
    """The innermost line outside of torch and of this project's packages; the innermost one if there is none."""
    for one in _outwards(frame):
        package = str(one.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("torch", "threading", "contextlib") and not package.startswith("ds_"):
            return f"{one.f_code.co_filename}:{one.f_lineno} in {one.f_code.co_name}"
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _outwards(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
