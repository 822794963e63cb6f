"""Hosts on this machine that are joined by a slow link only, for benchmarks. Needs root.

A host is a process in network, mount and process namespaces of its own, so that ranks on different hosts can neither
read each other's memory nor share any. A bridge joins the hosts, and `tc tbf` limits what each sends. Segmentation
offload is off, so that the interface's counters count the packets of the wire.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HEADERS = 66
"""Bytes of each packet that are no payload: Ethernet, IP, TCP with timestamps."""


class Host:
    """The first process of a host, and its address."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address

    def command(self, *command: str) -> list[str]:
        """A command that runs on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "--", *command]


def printed(processes: Sequence[subprocess.Popen[str]], system: str, timeout_s: float) -> Any:
    """Waits for the ranks of a system, and returns what the first of them printed behind "RESULT ", as JSON.

    Raises:
        RuntimeError: it printed no result.
    """
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    line = next((line for line in outputs[0].splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{system}: no result; exit statuses {[p.returncode for p in processes]}")
    return json.loads(line.removeprefix("RESULT "))


@contextlib.contextmanager
def hosts(count: int, rate: str) -> Iterator[list[Host]]:
    """Makes hosts; they end with the block, and with this process."""
    with contextlib.ExitStack() as stack:
        bridge = started(stack, "unshare", "--net", "sleep", "infinity")
        until(lambda: os.readlink(f"/proc/{bridge}/ns/net") != os.readlink("/proc/self/ns/net"))
        network(bridge, "ip", "link", "add", "name", "joined", "type", "bridge")
        network(bridge, "ip", "link", "set", "joined", "up")
        made = []
        for number in range(1, count + 1):
            outer = started(
                stack,
                *("unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "sleep", "infinity"),
            )
            children = Path(f"/proc/{outer}/task/{outer}/children")
            until(lambda children=children: bool(children.read_text()))
            pid = int(children.read_text().split()[0])
            until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text().strip() == "sleep")
            ends = f"name slow0 netns {pid} type veth peer name port{number} netns {bridge}".split()
            subprocess.run(["ip", "link", "add", *ends], check=True)
            network(bridge, "ip", "link", "set", f"port{number}", "master", "joined", "up")
            network(pid, "ip", "link", "set", "lo", "up")
            network(pid, "ip", "link", "set", "slow0", "up")
            network(pid, "ip", "address", "add", f"10.79.0.{number}/24", "dev", "slow0")
            shape = f"tc qdisc add dev slow0 root tbf rate {rate} burst 128kb latency 400ms".split()
            network(pid, *shape)
            network(pid, sys.executable, __file__, "slow0")
            made.append(Host(pid, f"10.79.0.{number}"))
        yield made


def started(stack: contextlib.ExitStack, *command: str) -> int:
    """Starts a process that ends with the stack, or with this process."""
    libc = ctypes.CDLL(None)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(1, int(signal.SIGKILL))
    )

    def stop() -> None:
        process.kill()
        process.wait()

    stack.callback(stop)
    return process.pid


def network(pid: int, *command: str) -> None:
    """Runs a command in the network of a process."""
    subprocess.run(["nsenter", "-t", str(pid), "-n", "--", *command], check=True, timeout=60)


def until(condition: Callable[[], bool]) -> None:
    """Waits at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a host did not start within 20 s")
        time.sleep(0.02)


def no_offload(interface: str) -> None:
    """Turns off TCP segmentation offload (ETHTOOL_STSO) and generic segmentation offload (ETHTOOL_SGSO)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        for number in (0x1F, 0x24):
            value = ctypes.create_string_buffer(struct.pack("II", number, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(channel, 0x8946, request)  # SIOCETHTOOL


def sent() -> tuple[int, int]:
    """Bytes and packets that this host has sent."""
    folder = Path("/sys/class/net/slow0/statistics")
    if not folder.exists():  # /sys shows the network of the process that mounted it: read the other list
        fields = (
            next(x for x in Path("/proc/net/dev").read_text().splitlines() if "slow0:" in x)
            .split(":")[1]
            .split()
        )
        return int(fields[8]), int(fields[9])
    return int((folder / "tx_bytes").read_text()), int((folder / "tx_packets").read_text())


def missing() -> list[str]:
    """What this machine lacks: root, or programs of iproute2 and util-linux."""
    absent = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    return absent if os.getuid() == 0 else ["root", *absent]


if __name__ == "__main__":
    no_offload(sys.argv[1])
