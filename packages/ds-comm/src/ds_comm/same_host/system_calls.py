"""System calls to read and write the memory of another process, and to sleep until a shared word changes (futex)."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_MOST_PARTS = 512
"""Maximum number of tensors per system call; Linux permits 1024."""
_SYS_FUTEX: Mapping[str, int] = {"x86_64": 202}
"""Number of the system call by architecture. Only architectures on which other processors see stores in program order
(x86-64), because an entry of a mailbox must be complete before the count of entries increases.
"""
_FUTEX_WAIT, _FUTEX_WAKE, _ALL_WAITERS = 0, 1, 1 << 30


class _Range(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Time(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class System:
    """The system calls that this module makes."""

    read: Callable[..., int]
    """process_vm_readv"""
    write: Callable[..., int]
    """process_vm_writev"""
    call: Callable[..., int]
    """syscall"""
    futex: int
    """Number of the futex system call."""

    def wake(self, address: int) -> None:
        """Wakes the threads of all processes that sleep on the word at `address`."""
        self.call(self.futex, ctypes.c_void_p(address), _FUTEX_WAKE, _ALL_WAITERS, None, None, 0)

    def sleep(self, address: int, value: int, seconds: float) -> None:
        """Sleeps until another process has changed the word from `value` and called `wake`, or for `seconds`."""
        limit = ctypes.byref(_Time(int(seconds), int(seconds % 1 * 1e9)))
        # A futex has 32 bits: here the lower half of the 64-bit word, which comes first on little-endian x86.
        low = ctypes.c_uint32(value & 0xFFFFFFFF)
        self.call(self.futex, ctypes.c_void_p(address), _FUTEX_WAIT, low, limit, None, 0)


@functools.cache
def system_calls() -> System | None:
    """Returns None if one of the system calls is missing."""
    number = _SYS_FUTEX.get(os.uname().machine) if hasattr(os, "uname") else None
    if number is None or not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return None
    try:
        library = ctypes.CDLL(None, use_errno=True)
        read, write, call = library.process_vm_readv, library.process_vm_writev, library.syscall
    except (OSError, AttributeError):
        return None
    ranges = (ctypes.c_void_p, ctypes.c_ulong)
    for function in (read, write):
        function.restype = ctypes.c_ssize_t
        function.argtypes = (ctypes.c_int, *ranges, *ranges, ctypes.c_ulong)
    call.restype = ctypes.c_long
    return System(read, write, call, number)


def copy_from(pid: int, addresses: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Fills contiguous CPU `tensors` from `addresses` in process `pid`.

    Raises:
        OSError: the process has ended, its memory must not be read, or an address is not mapped.
    """
    system = system_calls()
    if system is None:
        raise OSError("this system has no process_vm_readv")
    copy_parts(system.read, pid, parts_of(addresses, tensors))


Part = tuple[int, int, int]
"""(address in this process, address in the other process, number of bytes)."""


def parts_of(addresses: Sequence[int], tensors: Sequence[Tensor]) -> list[Part]:
    """Returns the parts that fill `tensors` from `addresses` in another process."""
    return [(t.data_ptr(), a, t.nbytes) for t, a in zip(tensors, addresses, strict=True)]


def copy_parts(call: Callable[..., int], pid: int, todo: list[Part]) -> None:
    """Copies parts between this process and process `pid`, by `System.read` or `System.write` as `call`."""
    while todo:
        now = todo[:_MOST_PARTS]
        here = (_Range * len(now))(*[_Range(own, length) for own, _, length in now])
        there = (_Range * len(now))(*[_Range(other, length) for _, other, length in now])
        copied = call(pid, here, len(now), there, len(now), 0)
        if copied == sum(length for _, _, length in now):
            todo = todo[_MOST_PARTS:]
            continue
        if copied <= 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        todo = [*_rest(now, copied), *todo[_MOST_PARTS:]]


def _rest(parts: Sequence[Part], copied: int) -> list[Part]:
    """Returns the parts that remain after `copied` bytes. The kernel may stop at any byte."""
    left = []
    for own, other, length in parts:
        done = min(length, copied)
        copied -= done
        if done < length:
            left.append((own + done, other + done, length - done))
    return left
