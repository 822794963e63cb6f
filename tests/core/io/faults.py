"""Faults of the I/O engine's system calls, as `_core._io_set_faults` takes them."""

from __future__ import annotations

Fault = tuple[str, int, int, int, int, bool]


def fault(
    call: str,
    *,
    code: int = 0,
    at_most: int = -1,
    skip: int = 0,
    times: int = 1,
    hold: bool = False,
) -> Fault:
    """A fault of a system call: after `skip` calls, `times` of them (-1: all) are hit."""
    return (call, skip, times, code, at_most, hold)
