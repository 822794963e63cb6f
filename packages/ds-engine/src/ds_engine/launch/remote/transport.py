"""How an agent is started on a machine: command lines, without running them.

The remote command is the same for every job, apart from the interpreter's path: the job itself goes over the agent's
stdin, so that no word of it reaches a shell.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ds_engine.launch.network import is_this_machine

_MODULE = "ds_engine.launch.remote.agent"


@dataclass(frozen=True, kw_only=True)
class Transport:
    """How machines are reached."""

    python: str = sys.executable
    """Path of the interpreter on the other machines."""
    port: int | None = None
    """Port of the ssh servers; None: ssh's own configuration."""
    arguments: tuple[str, ...] = ()
    """Further arguments of ssh."""
    activate: str | None = None
    """A shell script that the remote shell reads before it starts the agent (the `activate` of an environment)."""
    connect_s: int = 10
    """Seconds after which an attempt to connect fails."""
    alive_s: int = 60
    """Seconds after which ssh itself may give up a silent connection."""

    def command(self, host: str) -> list[str]:
        """Returns the command that starts an agent on `host`, on this machine without ssh."""
        if is_this_machine(host):
            return self._local()
        return [
            "ssh",
            *("-o", "BatchMode=yes"),  # nobody can answer a question
            *("-o", f"ConnectTimeout={self.connect_s}"),
            *("-o", f"ServerAliveInterval={max(1, self.alive_s // 2)}", "-o", "ServerAliveCountMax=4"),
            *("-o", "ClearAllForwardings=yes"),
            "-T",
            *(("-p", str(self.port)) if self.port is not None else ()),
            *self.arguments,
            "--",
            host,
            self._remote(),
        ]

    def _local(self) -> list[str]:
        if self.activate is None:
            return [self.python, "-m", _MODULE]
        return ["sh", "-c", self._remote()]

    def _remote(self) -> str:
        # From /, so that no file of the user's home folder hides a module of Python.
        words: list[str] = ["cd", "/", "&&"]
        if self.activate is not None:
            words += [".", shlex.quote(self.activate), "&&"]
        return " ".join([*words, "exec", shlex.quote(self.python), "-m", _MODULE])


def split_arguments(text: str) -> tuple[str, ...]:
    """Splits the value of --launcher-args as a shell would."""
    return tuple(shlex.split(text))


def describe(command: Sequence[str]) -> str:
    """Returns the command as one line for a message."""
    return shlex.join(command[:-1] if command[0] == "ssh" else command)
