"""Errors of the I/O engine: what failed, where in which file, and what to do about it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TypeVar


class IoError(OSError):
    """An operation on a file failed. `errno` and `filename` are those of OSError."""

    operation: str = ""
    """"open", "read", "write" or "close"."""
    offset: int = 0
    """Where the operation begins in the file, in bytes."""
    num_bytes: int = 0
    """Size of the operation."""
    bytes_done: int = 0
    """Bytes that were transferred before it failed; not necessarily the first ones."""


class IoTimeoutError(IoError, TimeoutError):
    """An operation was not done in time. It goes on, and its tensor must not be used before it is done."""


E = TypeVar("E", bound=IoError)

REMEDIES = {
    errno.ENOSPC: "Free space on this file system, or choose a folder on another one.",
    errno.EDQUOT: "The quota of this user is used up: free space, or choose a folder on another file system.",
    errno.EFBIG: "The file system or `ulimit -f` does not allow files of this size.",
    errno.EIO: "The device reports an error: look at the kernel's log (dmesg) and replace the device if it is broken.",
    errno.EBADF: "The file's descriptor was closed by somebody else in this process, for example by os.close.",
    errno.EACCES: "Change the permissions of the file or of its folder, or choose another folder.",
    errno.EPERM: "Change the permissions of the file or of its folder, or choose another folder.",
    errno.EROFS: "The file system is mounted read-only: choose another folder.",
    errno.ENOENT: "Create the folder, or check the path.",
    errno.EEXIST: "Remove the file, or open it with exclusive=False.",
    errno.EISDIR: "The path is a folder: name a file in it.",
    errno.ESPIPE: "Only regular files and block devices can be read and written at an offset.",
    errno.EMFILE: "Too many files are open in this process: raise `ulimit -n`, or close files.",
    errno.ENFILE: "Too many files are open on this machine.",
    errno.ENOMEM: "The kernel is out of memory: free some, or use a lower queue_depth.",
    errno.ECANCELED: "The engine was closed before the operation was done: wait for the operation first.",
    errno.EAGAIN: "The kernel refused the request again and again: lower the load or the queue_depth.",
}


@dataclass(frozen=True)
class Facts:
    """What is known of an operation, as the native module reports it."""

    code: int
    failed_at: int
    file_bytes: int
    bytes_done: int
    path: str
    is_write: bool
    offset: int
    num_bytes: int

    @property
    def operation(self) -> str:
        return "write" if self.is_write else "read"

    @property
    def text(self) -> str:
        return (
            f"{self.operation} of {self.num_bytes} bytes at offset {self.offset}, "
            f"{self.bytes_done} bytes of them done"
        )


def open_error(error: OSError, path: str) -> IoError:
    """The error for a file that cannot be opened or created."""
    code = error.errno or errno.EIO
    remedy = REMEDIES.get(code, "")
    result = IoError(code, f"{error.strerror}. {remedy}".rstrip(), path)
    result.operation = "open"
    return result


def failed(facts: Facts) -> IoError:
    """The error for an operation that failed."""
    if facts.file_bytes >= 0:
        expected = facts.offset + facts.num_bytes
        message = (
            f"{facts.text}: the file has {facts.file_bytes} bytes, at least {expected} were expected. It was truncated "
            "or never written that far: restore it, or write it again"
        )
    else:
        message = f"{facts.text}, failed at offset {facts.failed_at}: {os.strerror(facts.code)}. "
        message += REMEDIES.get(facts.code, "")
    return _with_facts(IoError(facts.code, message.rstrip(), facts.path), facts)


def timed_out(facts: Facts, limit: str) -> IoTimeoutError:
    """The error for an operation that takes too long; `limit` says which limit was reached."""
    message = (
        f"{facts.text}, is not done {limit}. The device or the network behind the file system may be stuck: look at "
        "the kernel's log (dmesg)"
    )
    return _with_facts(IoTimeoutError(errno.ETIMEDOUT, message, facts.path), facts)


def _with_facts(error: E, facts: Facts) -> E:
    error.operation = facts.operation
    error.offset = facts.offset
    error.num_bytes = facts.num_bytes
    error.bytes_done = facts.bytes_done
    return error
