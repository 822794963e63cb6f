"""Addresses, ports and network interfaces of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import random
import socket
import struct
from pathlib import Path

from ds_engine.launch.plan import LaunchError

# Below the range of ephemeral ports, so that no outgoing connection can take the port between our check and the
# moment when rank 0 listens on it.
_PORTS = range(20_000, 30_000)
_SIOCGIFADDR = 0x8915


def free_port(address: str = "127.0.0.1") -> int:
    """Returns a TCP port on which nothing listens at `address` ("" for all addresses of this machine)."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"200 random TCP ports between {_PORTS.start} and {_PORTS.stop - 1} are all taken: `ss -tlnp` shows "
        f"by whom"
    )


def loopback_interface() -> str | None:
    """Returns the name of Linux's loopback interface, if there is one."""
    return "lo" if "lo" in {name for _, name in socket.if_nameindex()} else None


def is_loopback(host: str) -> bool:
    """Whether this name or address means the machine itself wherever it is used."""
    return host in ("localhost", "::1", "localhost.localdomain") or host.startswith("127.")


def is_this_machine(host: str) -> bool:
    """Whether `host` is a name or address of this machine."""
    if is_loopback(host) or host == socket.gethostname():
        return True
    with contextlib.suppress(OSError, UnicodeError):
        return any(_can_bind(family, address) for family, address in _addresses(host))
    return False


def interface_towards(host: str | None) -> str | None:
    """Returns the network interface over which this machine reaches another, which is None for no other: then the
    loopback interface. Returns None if it is unknown, or would be the loopback interface although there is another.
    """
    if host is None:
        return loopback_interface()
    with contextlib.suppress(OSError, UnicodeError):
        for family, address in _addresses(host):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing, but chooses the route
                own = probe.getsockname()[0]
            name = _interface_of(own)
            if name is not None and name != loopback_interface():
                return name
    return None


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in answers))


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _interface_of(address: str) -> str | None:
    """Returns the interface that has this address."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address).hex()
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                if line.startswith(packed):
                    return line.split()[-1]
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None
