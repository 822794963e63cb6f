"""Hosts on this machine: each has its own network, processes, name and mounts, and only a bridge joins them.

A host is a process tree in namespaces of its own, with an ssh server. All hosts see the same files (as on a cluster
with a shared file system), except for /etc/hosts, /dev/shm and what `replaced` puts over a file. Everything ends with
the process that made it, also if that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_START_S = 20.0
_PR_SET_PDEATHSIG = 1
_SSHD = "/usr/sbin/sshd"

# The first process of a host: when it ends, the kernel ends all others of the host.
_INIT = """
set -e
mount --make-rprivate /
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs none /dev/shm
ip link set lo up
touch "$2.$1.up"
while ! ip -o address show dev eth0 2>/dev/null | grep -q inet; do sleep 0.02; done
"$3" -f "$4" -E "$5"
exec sleep infinity
"""


def missing() -> str | None:
    """Returns what this machine lacks for hosts; None if nothing."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "needs Linux and root"
    for program, package in (
        (_SSHD, "openssh-server"),
        ("ssh", "openssh-client"),
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(program) is None:
            return f"needs {program} (Debian package {package})"
    tried = subprocess.run(
        ["unshare", "-n", "-p", "-u", "-m", "-f", "--mount-proc", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else f"needs namespaces: {tried.stderr.decode().strip()}"


class Host:
    """One host."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self._folder = folder
        self.pid = 0
        """Of its first process, as seen from outside."""

    @property
    def inside(self) -> list[str]:
        """The beginning of a command that runs on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-u", "-m", "--"]

    def inside_folder(self, folder: Path) -> tuple[str, ...]:
        """As `inside`, with this working directory."""
        return (*self.inside, "sh", "-c", 'cd "$0" && exec "$@"', str(folder))

    def run(self, *command: str) -> str:
        """Runs a command on this host, and returns its output."""
        return subprocess.check_output(
            [*self.inside, *command], text=True, stderr=subprocess.STDOUT, timeout=30
        )

    @contextlib.contextmanager
    def replaced(self, path: Path, text: str) -> Iterator[None]:
        """On this host only, the file has another content."""
        other = self._folder / f"{self.name}-{path.name}"
        other.write_text(text)
        self.run("mount", "--bind", str(other), str(path))
        try:
            yield
        finally:
            self.run("umount", str(path))

    @contextlib.contextmanager
    def sessions_with(self, **environ: str) -> Iterator[None]:
        """New ssh sessions on this host have these variables."""
        config = self._folder / "sshd_config"
        words = " ".join(f"{name}={value}" for name, value in environ.items())
        with self.replaced(config, f"{config.read_text()}SetEnv {words}\n"):
            self._restart_sshd()
            yield
        self._restart_sshd()

    def _restart_sshd(self) -> None:
        """Makes sshd read its configuration again."""
        log = self._folder / f"sshd-{self.name}.log"
        listening = log.read_text().count("Server listening")
        self.run("pkill", "-HUP", "-o", "sshd")
        _await(lambda: log.read_text().count("Server listening") > listening, f"sshd of {self.name} again")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """The host's link is down: nothing it sends arrives, and nothing says so."""
        self.run("ip", "link", "set", "eth0", "down")
        try:
            yield
        finally:
            self.run("ip", "link", "set", "eth0", "up")

    def processes(self, word: str) -> list[int]:
        """Process ids, as seen from outside, of this host's processes with `word` in their command line."""
        return [pid for pid in self._members() if word in _command_line(pid)]

    def _members(self) -> list[int]:
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        members = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    entry.name.isdigit()
                    and os.readlink(entry / "ns" / "pid") == own
                    and int(entry.name) != self.pid
                ):
                    members.append(int(entry.name))
        return members


class Network:
    """Several hosts that see each other."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.hosts = {
            name: Host(name, f"10.77.0.{number}", folder) for number, name in enumerate(names, start=1)
        }

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def ssh_arguments(self) -> str:
        """The value of --launcher-args with which ssh uses the key of this network."""
        return f"-F {self.folder / 'ssh_config'}"


@contextlib.contextmanager
def network(folder: Path, names: Sequence[str] = ("host-a", "host-b")) -> Iterator[Network]:
    """Makes hosts; they end with the block."""
    made = Network(folder, names)
    _write_files(made)
    with contextlib.ExitStack() as stack:
        bridge = _started(stack, "unshare", "--net", "sleep", "infinity")
        _await(lambda: _has_own(bridge, "net"), "the bridge's namespace")
        _in_network(bridge, "ip", "link", "add", "bridge", "type", "bridge")
        _in_network(bridge, "ip", "link", "set", "bridge", "up")
        for host in made.hosts.values():
            _start(stack, made, host, bridge)
        for host in made.hosts.values():
            _await(functools.partial(_answers, host), f"sshd of {host.name}: {_log(made, host)}")
        yield made


def _start(stack: contextlib.ExitStack, made: Network, host: Host, bridge: int) -> None:
    names = made.folder / "hosts"
    words = [host.name, str(names), _SSHD, str(made.folder / "sshd_config"), str(_log(made, host))]
    outer = _started(
        stack,
        *("unshare", "-n", "-p", "-u", "-m", "-f", "--mount-proc", "--kill-child"),
        *("sh", "-c", _INIT, "init", *words),
    )
    up = Path(f"{names}.{host.name}.up")
    _await(up.exists, f"the namespaces of {host.name}")
    host.pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])
    port = f"port-{host.name}"[:15]
    ends = (f"eth0 netns {host.pid} type veth peer name {port} netns {bridge}").split()
    subprocess.run(["ip", "link", "add", *ends], check=True, timeout=30)
    _in_network(bridge, "ip", "link", "set", port, "master", "bridge", "up")
    _in_network(host.pid, "ip", "link", "set", "eth0", "up")
    _in_network(host.pid, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")


def _write_files(made: Network) -> None:
    folder = made.folder
    folder.mkdir(parents=True, exist_ok=True)
    for key in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True, timeout=30
        )
    lines = ["127.0.0.1 localhost", *(f"{host.address} {name}" for name, host in made.hosts.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on this folder
    (folder / "sshd_config").write_text(f"""
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
UseDNS no
""")
    (folder / "ssh_config").write_text(f"""
Host *
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile {folder}/known_hosts
  LogLevel ERROR
""")


def _started(stack: contextlib.ExitStack, *command: str) -> int:
    libc = ctypes.CDLL(None)

    def die_with_us() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_us)

    def stop() -> None:
        process.kill()
        process.wait()

    stack.callback(stop)
    return process.pid


def _in_network(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", "--", *command], check=True, timeout=30)


def _has_own(pid: int, kind: str) -> bool:
    return os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def _answers(host: Host) -> bool:
    command = ["bash", "-c", f"exec 3<>/dev/tcp/{host.address}/22"]
    tried = subprocess.run([*host.inside, *command], capture_output=True, timeout=30, check=False)
    return tried.returncode == 0


def _log(made: Network, host: Host) -> Path:
    return made.folder / f"sshd-{host.name}.log"


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer within {_START_S:g} s: {what}")
        time.sleep(0.02)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
