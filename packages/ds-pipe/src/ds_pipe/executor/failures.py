"""How the ranks of a pipeline learn that one of them cannot go on."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ds_pipe.errors import PipelineError

POLL_S = 0.25
"""How often a rank that waits asks whether another one has failed."""


class FailureBoard(Protocol):
    """One message that all ranks can read, and a count of those that are done."""

    def report(self, message: str) -> str:
        """Writes the message, if there is none yet. Returns the first one."""

    def read(self) -> str | None:
        """Returns the message, if there is one."""

    def arrive(self, step: int) -> bool:
        """Counts a rank that has finished a step, and waits a moment for the others; whether all have finished.

        To be called again until it returns True.
        """


class StoreBoard:
    """In the store of the process group."""

    def __init__(self, store: Store, name: str, num_ranks: int) -> None:
        """Uses keys that begin with `ds_pipe/` and `name`."""
        self._store, self._name, self._num_ranks = store, f"ds_pipe/{name}", num_ranks
        self._arrived = -1
        # All ranks ask one process: together at most 20000 times a second.
        self._longest_pause_s = min(0.05, max(0.001, num_ranks / 20000))

    def report(self, message: str) -> str:
        try:
            return self._store.compare_set(f"{self._name}/failure", "", message).decode()
        except RuntimeError:  # the store is gone: the others see this, too
            return message

    def read(self) -> str | None:
        key = f"{self._name}/failure"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            return f"the process that holds the store of the process group has ended ({_first_line(error)})"

    def arrive(self, step: int) -> bool:
        done = f"{self._name}/done/{step}"
        try:
            if self._arrived < step:
                self._arrived = step
                if self._store.add(f"{self._name}/count/{step}", 1) == self._num_ranks:
                    self._store.set(done, "1")
                    self._store.delete_key(f"{self._name}/count/{step}")
                    if step:
                        self._store.delete_key(f"{self._name}/done/{step - 1}")
            end, pause = time.monotonic() + POLL_S, 0.0002
            while not self._store.check([done]):  # a wait that times out would print a warning
                if time.monotonic() > end:
                    return False
                time.sleep(pause)
                pause = min(2 * pause, self._longest_pause_s)
        except RuntimeError as error:
            message = (
                f"the process that holds the store of the process group has ended ({_first_line(error)})"
            )
            raise PipelineError(message) from error
        return True


class MemoryBoard:
    """For the threads of one process."""

    def __init__(self, num_ranks: int) -> None:
        """Counts `num_ranks` threads."""
        self._lock = threading.Condition()
        self._num_ranks = num_ranks
        self._message: str | None = None
        self._arrivals: dict[int, set[int]] = {}

    def report(self, message: str) -> str:
        with self._lock:
            self._message = self._message or message
            self._lock.notify_all()
            return self._message

    def read(self) -> str | None:
        return self._message

    def arrive(self, step: int) -> bool:
        with self._lock:
            arrivals = self._arrivals.setdefault(step, set())
            arrivals.add(threading.get_ident())
            if len(arrivals) == self._num_ranks:
                self._lock.notify_all()
            return self._lock.wait_for(lambda: len(arrivals) == self._num_ranks, POLL_S)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


def default_store() -> Store:
    """Returns a connection of our own to the store of the default process group."""
    store = dist.distributed_c10d._get_default_store()
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        own: Store = clone()  # the training thread may wait in the other connection
    except (RuntimeError, NotImplementedError):
        return store
    return own
