"""The process from which all ranks are forked. [Note: why a zygote]

Importing torch costs seconds, and forking the process of pytest is unsafe: it has threads, open files and
the state of earlier tests. So one clean process imports torch and pytest once, stays single-threaded
(checked), and forks a rank in a few milliseconds whenever the pool asks: growing from 2 to 4 ranks, and
replacing the ranks after a failed test, cost next to nothing, and the pages of torch are shared between all
of them.

Requests come over a SOCK_SEQPACKET socket, one message each: `fork` (with three descriptors) answers the
new process id, `wait <pid>` answers its exit status. When the socket closes, or the process of pytest dies,
everything dies.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when `parent`, which must be the parent process's id, goes away."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died between our start and the call above
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serves until the other end of the socket closes. Never returns in a forked rank."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the socket
    requests = socket.socket(fileno=descriptor)
    requests.send(_prepare().encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 256, 3)
        if not message:
            return
        verb, _, argument = message.decode().partition(" ")
        if verb == "fork":
            requests.send(str(_fork(requests, descriptors)).encode())
        elif verb == "wait":
            _, status = os.waitpid(int(argument), 0)
            requests.send(str(os.waitstatus_to_exitcode(status)).encode())


def _prepare() -> str:
    """Loads what every rank needs; returns "ready" or why no rank may be forked from here."""
    for name in ("numpy", "pytest", "torch", "torch.distributed", "harness.worker"):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    sys.modules["harness.worker"].show_values_in_asserts()
    tasks = os.listdir("/proc/self/task")
    if len(tasks) != 1:
        names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]  # noqa: SIM115
        return f"importing torch started threads ({', '.join(names)}), so that forking is unsafe"
    gc.collect()
    gc.freeze()  # otherwise the first collection in each rank copies all the shared pages
    return "ready"


def _fork(requests: socket.socket, descriptors: list[int]) -> int:
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here and in the child: whichever is first, so that killpg always works
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(zygote)
        requests.close()
        sys.modules["harness.worker"].serve(*descriptors)
        code = 0
    finally:
        os._exit(code)  # the zygote's atexit handlers and buffers are not ours
