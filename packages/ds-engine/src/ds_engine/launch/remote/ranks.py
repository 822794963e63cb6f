"""The launcher's end: the ranks of several machines, each of which has an agent."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_engine.launch.failure import RankEnd
from ds_engine.launch.output import Outputs, Sink, Tail
from ds_engine.launch.rank import ChildSetup
from ds_engine.launch.remote.frames import Frame
from ds_engine.launch.remote.job import HostShare
from ds_engine.launch.remote.link import Link, Pulse

_GREETING = Pulse(timeout_s=60.0)
_KEPT_BYTES = 4096
_CLOSE_S = 5.0
_AFTER_KILL = Pulse(timeout_s=12.0)
"""After SIGKILL a machine that is still there answers at once."""


class RemoteRank:
    """What is known of a rank on another machine."""

    def __init__(self, rank: int, outputs: Outputs) -> None:
        self.rank = rank
        self.has_ended = False
        self.tail = Tail()
        self.sinks: Mapping[str, Sink | None] = {"stdout": outputs.stdout, "stderr": outputs.stderr}

    def feed(self, stream: str, data: bytes) -> None:
        """Takes output."""
        sink = self.sinks[stream]
        if sink is not None:
            sink.feed(data)
        if stream == "stderr":
            self.tail.feed(data)

    def close(self) -> None:
        """The rank has ended, or nothing more will be known of it."""
        self.has_ended = True
        for sink in self.sinks.values():
            if sink is not None:
                sink.close()


class RemoteHost:
    """A machine: the process that connects to its agent, and its ranks."""

    def __init__(self, share: HostShare, command: Sequence[str], selector: selectors.BaseSelector) -> None:
        self.share = share
        self.hello: Mapping[str, Any] | None = None
        self.ranks: dict[int, RemoteRank] = {}
        self.ends: list[RankEnd] = []
        self.stopped: list[int] = []
        self._failure: str | None = None
        self._messages = bytearray()
        self._selector = selector
        # In a session of its own, so that Ctrl-C on the terminal reaches the launcher only.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            start_new_session=True,
            preexec_fn=ChildSetup(),
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        receive, send = os.dup(self._process.stdout.fileno()), os.dup(self._process.stdin.fileno())
        self._process.stdout.close()
        self._process.stdin.close()
        self.link = Link(receive, send, selector, self._on_frame, pulse=_GREETING, magic=True)
        os.set_blocking(self._process.stderr.fileno(), False)
        selector.register(self._process.stderr, selectors.EVENT_READ, self._read_messages)

    @property
    def name(self) -> str:
        """Its name, as in the host file."""
        return self.share.host

    @property
    def is_running(self) -> bool:
        """Whether one of its ranks has not ended."""
        return any(not rank.has_ended for rank in self.ranks.values())

    def start(self, request: Mapping[str, Any], pulse: Pulse, outputs_of: Callable[[int], Outputs]) -> None:
        """Starts the ranks."""
        self.ranks = {rank: RemoteRank(rank, outputs_of(rank)) for rank in self.share.ranks}
        self.link.pulse = pulse
        self.link.send("start", **request)

    def check(self) -> None:
        """Sends a heartbeat if one is due. If the machine is lost, its ranks end."""
        self.link.beat()
        reason = self.lost_because()
        if reason is None or not self.is_running:
            return
        for rank in self.ranks.values():
            if not rank.has_ended:
                self._end(
                    rank, RankEnd(rank=rank.rank, pid=0, returncode=0, ended_s=time.monotonic(), lost=reason)
                )
        self._stop_process()

    def lost_because(self) -> str | None:
        """Returns why nothing more can be heard from it; None while the connection is open."""
        if self._failure is not None:
            return self._failure
        if self.link.closed is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._read_messages()
        said = self._messages.decode(errors="replace").strip().splitlines()[-3:]
        if not said:
            said = self.link.preamble.strip().splitlines()[-1:]
        code = self._process.returncode
        status = f" (exit code {code})" if code and not said else ""
        return f"{self.link.closed}{status}{': ' if said else ''}{'; '.join(line.strip() for line in said)}"

    def close(self) -> None:
        """Ends the agent, and with it whatever is left of the ranks."""
        self.link.send("kill")
        self.link.close("closed by the launcher")
        for rank in self.ranks.values():
            if not rank.has_ended:
                rank.close()

    def finish(self, deadline_s: float) -> None:
        """Waits until the agent has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        self._stop_process()
        if self._process.stderr is not None and not self._process.stderr.closed:
            self._selector.unregister(self._process.stderr)
            self._process.stderr.close()

    def _on_frame(self, frame: Frame) -> None:
        fields = frame.fields
        if frame.kind == "hello":
            self.hello = fields
        elif frame.kind == "heartbeat":
            self.stopped = fields.get("stopped", [])
        elif frame.kind == "output":
            self.ranks[fields["rank"]].feed(fields["stream"], frame.body)
        elif frame.kind == "ended":
            # The clocks of machines differ: what counts is when the launcher hears of it.
            rank = self.ranks[fields["rank"]]
            self._end(rank, RankEnd(**fields, ended_s=time.monotonic()))
        elif frame.kind == "failed":
            self._failure = fields["reason"]

    def _end(self, rank: RemoteRank, end: RankEnd) -> None:
        rank.close()
        self.ends.append(
            RankEnd(
                **{
                    **vars(end),
                    "host": self.name,
                    "traceback_s": rank.tail.traceback_s,
                    "stderr": rank.tail.text(),
                }
            )
        )

    def _read_messages(self, _: int = -1) -> None:
        """Keeps the end of what ssh, or the agent's interpreter, writes to stderr."""
        stream = self._process.stderr
        if stream is None or stream.closed:
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(stream.fileno(), 1 << 16)
                if not data:
                    self._selector.unregister(stream)
                    stream.close()
                    return
                self._messages += data
                del self._messages[:-_KEPT_BYTES]

    def _stop_process(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the ranks of all machines are started."""

    requests: Sequence[Mapping[str, Any]]
    """For each machine, the fields of the frame "start"."""
    pulse: Pulse
    """When a machine is considered lost."""
    outputs_of: Callable[[int], Outputs]
    """Where the output of a rank goes."""


class RemoteCrew:
    """The ranks of several machines, as a supervisor sees them."""

    def __init__(self, hosts: Sequence[RemoteHost], start: Start, say: Callable[[str], None]) -> None:
        self.num_ranks = sum(len(host.share.slots) for host in hosts)
        self._hosts = hosts
        self._start = start
        self._say = say
        self._silent: set[str] = set()
        self._stopped: dict[int, str] = {}

    @property
    def is_running(self) -> bool:
        """Whether a rank has not ended."""
        return any(host.is_running for host in self._hosts)

    @property
    def due_s(self) -> float:
        """When the next heartbeat is due."""
        return min(host.link.due_s for host in self._hosts)

    def start(self, selector: selectors.BaseSelector) -> None:
        """Starts the ranks of all machines."""
        for host, request in zip(self._hosts, self._start.requests, strict=True):
            host.start(request, self._start.pulse, self._start.outputs_of)

    def collect(self) -> list[RankEnd]:
        """Returns how ranks ended since the last call."""
        ends: list[RankEnd] = []
        for host in self._hosts:
            host.check()
            self._warn(host)
            ends += host.ends
            host.ends = []
        return ends

    def send(self, number: signal.Signals, *, to_end: bool = True) -> None:
        """Sends a signal to each rank that has not ended."""
        for host in self._hosts:
            host.link.send("signal", number=int(number), to_end=to_end)

    def kill(self) -> None:
        """Kills the ranks and all processes that they started. A machine that does not answer is lost soon after."""
        for host in self._hosts:
            host.link.send("kill")
            if host.link.pulse.timeout_s > _AFTER_KILL.timeout_s:
                host.link.pulse = _AFTER_KILL

    def forget(self) -> None:
        """What the ranks keep in memory for the next start is removed when they have ended."""
        for host in self._hosts:
            host.link.send("forget")

    def keep_alive(self) -> None:
        """Sends heartbeats that are due, while the launcher waits for its terminal."""
        for host in self._hosts:
            host.link.keep_alive()

    def resize(self) -> None:
        """Does nothing: ranks on other machines have no terminal."""

    def close(self) -> None:
        """Ends all agents."""
        close_all(self._hosts)

    def _warn(self, host: RemoteHost) -> None:
        """Says when a machine is silent or a rank stopped, and when that is over."""
        timeout_s = host.link.pulse.timeout_s
        is_silent = host.is_running and host.link.closed is None and host.link.silent_s > timeout_s / 2
        if is_silent != (host.name in self._silent):
            if is_silent:
                self._silent.add(host.name)
                self._say(
                    f"no heartbeat from {host.name} for {host.link.silent_s:.0f} s; it is lost after {timeout_s:g} s"
                )
            else:
                self._silent.discard(host.name)
                if host.link.closed is None:
                    self._say(f"{host.name} answers again")
        stopped = [rank for rank in host.stopped if not host.ranks[rank].has_ended]
        for rank in stopped:
            if rank not in self._stopped:
                self._stopped[rank] = host.name
                self._say(
                    f"rank {rank} on {host.name} is stopped (SIGSTOP or a debugger); the others wait for it"
                )
        for rank in [
            rank for rank, name in self._stopped.items() if name == host.name and rank not in stopped
        ]:
            del self._stopped[rank]


def close_all(hosts: Sequence[RemoteHost]) -> None:
    """Ends all agents, and waits for them together."""
    for host in hosts:
        host.close()
    deadline_s = time.monotonic() + _CLOSE_S
    for host in hosts:
        host.finish(deadline_s)
