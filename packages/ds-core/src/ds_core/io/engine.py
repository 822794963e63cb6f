"""The I/O engine: workers that read and write files while Python computes."""

from __future__ import annotations

import errno
import os
import weakref
from types import TracebackType
from typing import Literal

from torch import Tensor

from ds_core import _native
from ds_core.io.errors import Facts, IoError, failed, open_error, timed_out
from ds_core.io.file import File


class Work:
    """A read or a write that has begun. It goes on, and keeps its tensor alive, also if nobody holds this object."""

    def __init__(self, native: _native.core.IoWork, stall_limit_s: float) -> None:
        self._native = native
        self._stall_limit_s = stall_limit_s

    def done(self) -> bool:
        """Whether it is done, or has failed. `wait` raises if it has."""
        return self._native.done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when it is done.

        Args:
            timeout_s: how long to wait, in seconds; by default as long as some request of the engine completes within
                `stall_limit_s`.

        Raises:
            IoError: it failed; the message names file, operation, offset and remedy.
            IoTimeoutError: it is not done in time.
        """
        finished, fact = self._native.wait(timeout_s)
        if finished and fact[0] == 0:
            return
        facts = Facts(*fact)
        if finished:
            raise failed(facts)
        raise timed_out(facts, _limit(timeout_s, self._stall_limit_s))


class Engine:
    """Reads and writes tensors in the background: each operation as requests of `block_bytes`, many in flight at once.

    An engine belongs to the process that made it. In a child of fork every call raises RuntimeError.

    Args:
        backend: "io_uring", "threads" (pread and pwrite), or "auto": io_uring if this process may use it.
        block_bytes: size of a request, rounded up to whole pages.
        queue_depth: number of requests in flight.
        num_threads: number of threads, each with a ring if there is io_uring, where one is mostly enough. 0: one with
            io_uring, otherwise eight, each with one request in flight. "auto" without io_uring uses eight at least.
        direct: opens files with O_DIRECT where the file system has it; `File.direct` tells.
        stall_limit_s: waits end with IoTimeoutError if no request has completed for so many seconds.

    Raises:
        IoError: the backend is "io_uring" and this process cannot use it.
    """

    def __init__(
        self,
        *,
        backend: Literal["auto", "io_uring", "threads"] = "auto",
        block_bytes: int = 1 << 20,
        queue_depth: int = 32,
        num_threads: int = 0,
        direct: bool = True,
        stall_limit_s: float = 300.0,
    ) -> None:
        if backend not in ("auto", "io_uring", "threads"):
            raise ValueError(f'backend is "auto", "io_uring" or "threads", but is {backend!r}')
        for name, value, least in (
            ("block_bytes", block_bytes, 1),
            ("queue_depth", queue_depth, 1),
            ("num_threads", num_threads, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        if not stall_limit_s > 0:
            raise ValueError(f"stall_limit_s must be positive, but is {stall_limit_s}")
        if not _native.has_native():
            raise IoError(errno.ENOSYS, f"the I/O engine needs the native module: {_native.MISSING}")
        try:
            native = _native.core.IoEngine(
                backend, block_bytes, queue_depth, num_threads, direct, stall_limit_s
            )
        except OSError as error:
            raise IoError(
                error.errno, f'{error.strerror}. Use backend="auto" to fall back to threads'
            ) from None
        self._native = native
        self.stall_limit_s = stall_limit_s
        self.closed = False
        # Also at the exit of the interpreter: what is in flight then must be written, not lost.
        self._finalizer = weakref.finalize(self, _finish, native)

    @property
    def backend(self) -> str:
        """What is in use: "io_uring" or "threads"."""
        return self._native.backend

    @property
    def reason(self) -> str:
        """Why the backend is not io_uring; empty if it is."""
        return self._native.reason

    def open(
        self,
        path: str | os.PathLike[str],
        *,
        num_bytes: int | None = None,
        create: bool = False,
        exclusive: bool = False,
        read_only: bool = False,
    ) -> File:
        """Opens a file, or creates it.

        Args:
            path: of a regular file or block device.
            num_bytes: with `create`, room for so many bytes is allocated at once; otherwise, the size that the file
                must have at least.
            create: makes an empty file, also where one exists.
            exclusive: with `create`, a file that exists is an error.
            read_only: for a file that this process may not or should not write.

        Raises:
            IoError: it cannot be opened, there is no room for it, or it is too short.
        """
        self._check_open()
        name = os.fspath(path)
        if create and read_only:
            raise ValueError(
                f"{name}: a file that is created cannot be read_only; leave out one of create and read_only"
            )
        if num_bytes is not None and num_bytes < 0:
            raise ValueError(f"{name}: num_bytes must not be negative, but is {num_bytes}")
        try:
            native = self._native.open(
                name, create, exclusive, read_only, -1 if num_bytes is None else num_bytes
            )
        except OSError as error:
            raise open_error(error, name) from None
        file = File(self, native, name)
        if not create and num_bytes is not None and file.num_bytes < num_bytes:
            actual = file.num_bytes
            native.close()
            raise IoError(
                errno.ENODATA,
                f"the file has {actual} bytes, at least {num_bytes} were expected. It was truncated or never written "
                "that far: restore it, or write it again",
                name,
            )
        return file

    def register(self, tensor: Tensor) -> str:
        """Tells the kernel a tensor that many operations will use, so that it looks up its pages only once.

        The engine keeps the tensor until `unregister` or the end. Operations work the same without this. Returns why
        the tensor could not be registered (no io_uring; `ulimit -l` is too low), or an empty string.
        """
        self._check_open()
        return self._native.register_memory(tensor)

    def unregister(self, tensor: Tensor) -> None:
        """Undoes `register`."""
        self._check_open()
        self._native.forget_memory(tensor)

    def close(self) -> None:
        """Waits for all operations and ends the workers. A second call does nothing.

        Raises IoError if an operation failed for which nobody has waited, and IoTimeoutError if no request has
        completed for `stall_limit_s`: then what is in flight is left alone, its tensors are never freed, and all that
        has not begun is cancelled.
        """
        if self.closed:
            return
        self.closed = True
        self._finalizer.detach()
        if not self._native.in_process_of_creation():
            return
        in_time = self._native.wait_all(None)
        self._native.stop()
        if not in_time:
            raise IoError(
                errno.ETIMEDOUT,
                f"close: operations are not done {_limit(None, self.stall_limit_s)}; those that had not begun were "
                "cancelled. The device or the network behind a file system may be stuck: look at the kernel's log "
                "(dmesg)",
            )
        for fact in self._native.unseen_failures(None):
            raise failed(Facts(*fact))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the I/O engine is closed")

    def _is_usable(self) -> bool:
        return not self.closed and self._native.in_process_of_creation()

    def _submit(self, file: _native.core.IoFile, tensor: Tensor, offset: int, *, is_write: bool) -> Work:
        self._check_open()
        if offset < 0:
            raise ValueError(f"offset must not be negative, but is {offset}")
        return Work(self._native.submit(is_write, file, tensor, offset), self.stall_limit_s)

    def _wait_for_file(self, file: _native.core.IoFile) -> None:
        if not self._native.wait_file(file, None):
            raise IoError(
                errno.ETIMEDOUT,
                f"close: operations of the file are not done {_limit(None, self.stall_limit_s)}",
            )


def _finish(native: _native.core.IoEngine) -> None:
    """The end of an engine that was not closed. It must not touch the workers of another process."""
    if native.in_process_of_creation():
        native.wait_all(None)
        native.stop()


def _limit(timeout_s: float | None, stall_limit_s: float) -> str:
    if timeout_s is not None:
        return f"after {timeout_s:g} s (timeout_s)"
    return f"although no request of the engine has completed for {stall_limit_s:g} s (stall_limit_s)"
