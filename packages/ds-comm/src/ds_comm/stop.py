"""`StopRequest`: a signal that asks a job to stop is answered by all ranks after the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C, the end of a time limit or a preemption, and what Slurm sends before (`--signal=USR1@120`)."""
_SAME_S = 1.0
"""Seconds within which further signals are the same request: a terminal signals every process, and a launcher forwards
the signal."""


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Notes signals that ask this process to stop, so that the job can save first.

    ::

        with ds_comm.StopRequest() as stop:
            for batch in loader:
                train(batch)
                if stop.agreed():  # on all ranks, after the same step
                    save()
                    break
        sys.exit(stop.exit_code)

    Signals reach the ranks at different times, or only some of them. `agreed` exchanges what was noted.

    A second signal, more than a second after the first one, raises `KeyboardInterrupt`. When the context is left,
    signals have their former effect again.
    """

    def __init__(
        self, signals: Sequence[str] = STOPPING, *, group: dist.ProcessGroup | None = None, every: int = 1
    ) -> None:
        """
        Args:
            signals: names of the signals; those that this system does not have are left out.
            group: ranks that stop together. None: all ranks of the default process group, if there is one.
            every: number of calls of `agreed` per exchange, the same on all ranks. An exchange is an all-reduce of
                four bytes.

        Raises:
            ValueError: `every` is below 1, or a name is not that of a signal.
        """
        if every < 1:
            raise ValueError(
                f"every={every}: the ranks must exchange requests at least once in a number of calls >= 1"
            )
        unknown = [name for name in signals if name not in STOPPING and not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"there is no signal {unknown[0]!r}: use names such as 'SIGTERM'")
        self._numbers = [signal.Signals[name] for name in signals if hasattr(signal, name)]
        self._group, self._every = group, every
        self._calls = 0
        self._noted: int | None = None
        self._noted_s = 0.0
        self._agreed = False
        self._former: dict[int, Any] = {}

    @property
    def noted(self) -> bool:
        """Whether this process itself has got a signal."""
        return self._noted is not None

    @property
    def exit_code(self) -> int:
        """128 + n if the ranks have agreed to stop and this process got signal n (143, that of SIGTERM, if only others
        got one); else 0.
        """
        if not self._agreed:
            return 0
        return 128 + (self._noted if self._noted is not None else int(signal.SIGTERM))

    def agreed(self) -> bool:
        """Whether a rank has got a signal: the same answer on all ranks, which must all call it equally often. It stays
        true.
        """
        self._calls += 1
        if self._agreed or self._calls % self._every:
            return self._agreed
        self._agreed = self._exchanged(self.noted)
        return self._agreed

    def _exchanged(self, noted: bool) -> bool:
        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return noted
        on_cpu = "gloo" in dist.get_backend(self._group)
        device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
        flag = torch.tensor([int(noted)], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def __enter__(self) -> StopRequest:
        """Starts to note signals.

        Raises:
            RuntimeError: this is not the main thread, which alone can handle signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "StopRequest must be entered in the main thread: Python handles signals only there"
            )
        for number in self._numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored on purpose, as under nohup
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals their former effect."""
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is not None and now > self._noted_s + _SAME_S:
            raise KeyboardInterrupt
        if self._noted is None:
            self._noted, self._noted_s = number, now
