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
from dataclasses import dataclass, replace
from typing import Any

import torch
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
_MESSAGES = frozenset(("send", "recv", "isend", "irecv", "batch_isend_irecv"))
"""Not collectives: ranks call them differently, so they are not compared."""

_log = logging.getLogger("ds_comm")


class StallWatch:
    """See `watch_stalls`."""

    def __init__(self, model: nn.Module | None, timeout_s: float, report: Callable[[str], None]) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._timeout_s, self._report = timeout_s, report
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        whole = PrefixStore("ds_comm.stalls", dist.distributed_c10d._get_default_store())
        # Ranks begin their watches in the same order, so that the n-th ones belong together.
        self._store = PrefixStore(str(whole.add(f"begun/{self._rank}", 1)), whole)
        self._main = threading.get_ident()
        self._members: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()
        self._ours: dict[types.CodeType, bool] = {}
        """Whether code belongs to torch or to this project's packages."""
        self._calls: dict[str, deque[_Noted]] = {}
        self._counts: dict[str, int] = {}
        self._running: tuple[str, float, Sequence[Tensor]] | None = None
        """Group of the collective that runs now, when it began, and its tensors."""
        self._asked = 0
        """Number of the last question that this rank has answered or asked."""
        self._reported: tuple[str, int] | None = None
        """Group and number of the collective that this rank has asked about."""
        self._stopped = threading.Event()
        self._functions = WrappedFunctions((n for n in OPERATIONS if n not in _MESSAGES), self._wrapped)
        self._thread = threading.Thread(target=self._look_repeatedly, name="ds_comm.stalls", daemon=True)
        self._thread.start()
        if model is not None:  # a watch that nobody closes ends with the model
            weakref.finalize(model, self._stopped.set)

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
            arguments = (*args, *kwargs.values()) if kwargs else args
            group = self._group(arguments)
            if group is None:
                return function(*args, **kwargs)
            self._note(name, group, arguments)
            try:
                return function(*args, **kwargs)
            finally:
                self._running = None

        return call

    def _note(self, name: str, group: str, arguments: Sequence[Any]) -> None:
        number = self._counts.get(group, 0)
        self._counts[group] = number + 1
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        shown = [(tensor.dtype, tensor.shape) for tensor in tensors] if name in _SAME_SHAPES else ()
        frame = self._user_frame(sys._getframe(2))
        noted = _Noted(number, name, shown, frame.f_code, frame.f_lineno)
        calls = self._calls.get(group)
        if calls is None:
            calls = self._calls[group] = deque(maxlen=KEPT)
        calls.append(noted)
        self._running = (group, time.monotonic(), tensors)

    def _user_frame(self, frame: types.FrameType) -> types.FrameType:
        """The innermost frame of the user's code; `frame` if there is none."""
        one: types.FrameType | None = frame
        while one is not None:
            ours = self._ours.get(one.f_code)
            if ours is None:
                ours = self._ours[one.f_code] = _is_ours(one)
            if not ours:
                return one
            one = one.f_back
        return frame

    def _group(self, arguments: Sequence[Any]) -> str | None:
        """The ranks of the group among the arguments as text; None if this rank is not in it."""
        given: Any = group_among(arguments)
        if given is dist.GroupMember.NON_GROUP_MEMBER or not dist.is_initialized():
            return None
        given = dist.group.WORLD if given is None else given
        members = self._members.get(given)
        if members is None:
            members = self._members[given] = ",".join(map(str, dist.get_process_group_ranks(given)))
        return members

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
        calls = {
            group: tuple(one.call() for one in tuple(noted)) for group, noted in list(self._calls.items())
        }
        if running is not None and (subject := self._name(running[2])):
            *before, last = calls[running[0]]
            calls[running[0]] = (*before, replace(last, subject=subject))
        return Position(
            rank=self._rank,
            place=_site(sys._current_frames().get(self._main)),
            calls=calls,
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
        model: whose parameters and gradients are named in the report. The watch ends with it at the latest.
        timeout_s: seconds; the report follows within about 4 s.
        report: called with the text, on one rank. Default: logs it.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s}: give seconds above 0")
    return StallWatch(model, timeout_s, report)


@dataclass(slots=True)
class _Noted:
    """A call as it is noted, in a few microseconds; `call` writes it out when somebody asks."""

    number: int
    name: str
    tensors: Sequence[tuple[torch.dtype, torch.Size]]
    code: types.CodeType
    line: int

    def call(self) -> Call:
        tensors = tuple(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in self.tensors)
        site = f"{self.code.co_filename}:{self.line} in {self.code.co_name}"
        return Call(number=self.number, name=self.name, tensors=tensors, site=site)


def _site(frame: types.FrameType | None) -> str:
    """The innermost line outside of torch and of this project's packages; the innermost one if there is none."""
    for one in _outwards(frame):
        if not _is_ours(one):
            return f"{one.f_code.co_filename}:{one.f_lineno} in {one.f_code.co_name}"
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: types.FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("torch", "threading", "contextlib") or package.startswith("ds_")


def _outwards(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
