"""`python -m ds_engine.launch.remote.agent`: runs the ranks of one machine for a launcher on another.

Frames arrive on stdin and leave on stdout. The launcher asks "examine", and then sends "start", "signal",
"kill" and "forget".
The agent answers "hello", and then sends "output", "ended" and "heartbeat". When the launcher is gone, the ranks end:
they get SIGTERM, and after the grace period SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from ds_engine.launch.crew import LocalCrew
from ds_engine.launch.machine import core_numbers, usable_cores
from ds_engine.launch.network import free_port, interface_towards
from ds_engine.launch.output import Outputs
from ds_engine.launch.plan import LaunchError, Part, bind_cores, make_plan, parse_cores
from ds_engine.launch.remote.facts import gather
from ds_engine.launch.remote.frames import MAGIC, Frame
from ds_engine.launch.remote.job import VISIBLE, visible
from ds_engine.launch.remote.link import Link, Pulse
from ds_engine.launch.signals import FORWARDED, STOPPING, CaughtSignals

_BACKLOG_BYTES = 8 << 20
"""While more output than this waits to be sent, none is read from the ranks: they wait, as for a slow terminal."""


class _FrameSink:
    """Sends the output of one stream of a rank as frames."""

    def __init__(self, link: Link, rank: int, stream: str) -> None:
        self._link = link
        self._rank = rank
        self._stream = stream

    def feed(self, data: bytes) -> None:
        self._link.send("output", data, rank=self._rank, stream=self._stream)

    def close(self) -> None:
        """Nothing is buffered; "ended" follows when the rank has ended."""


class Agent:
    """Runs the ranks of this machine."""

    def __init__(self, receive: int, send: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._outputs = selectors.DefaultSelector()  # of the ranks; a member of the other one
        self._reads_outputs = False
        self._crew: LocalCrew | None = None
        self._is_ending = False
        self._deadline_s = float("inf")
        self._grace_s = 10.0
        self._link = Link(receive, send, self._selector, self._on_frame, pulse=Pulse())
        self._link.status = self._status

    def run(self) -> None:
        """Serves the launcher until it closes the connection and no rank is left."""
        with self._selector, self._outputs, CaughtSignals(self._selector) as caught:
            try:
                while self._link.closed is None or self._is_running:
                    self._wait()
                    for number in caught.take():
                        self._act_on(number)
                    self._link.beat()
                    self._report()
                    if self._link.closed is not None and not self._is_ending:
                        self._end()
                    if time.monotonic() >= self._deadline_s and self._crew is not None:
                        self._crew.kill()
                        self._deadline_s = float("inf")
            finally:
                if self._crew is not None:
                    self._crew.close()

    @property
    def _is_running(self) -> bool:
        return self._crew is not None and self._crew.is_running

    def _wait(self) -> None:
        wish = self._is_running and self._link.backlog_bytes < _BACKLOG_BYTES
        if wish != self._reads_outputs:
            self._reads_outputs = wish
            if wish:
                self._selector.register(self._outputs, selectors.EVENT_READ, self._read_outputs)
            else:
                self._selector.unregister(self._outputs)
        left_s = min(self._deadline_s, self._link.due_s) - time.monotonic()
        for key, _ in self._selector.select(timeout=None if left_s == float("inf") else max(0.0, left_s)):
            key.data(key.fd)

    def _read_outputs(self, _: int) -> None:
        for key, _ in self._outputs.select(timeout=0):
            key.data(key.fd)

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == "examine":
            self._link.send("hello", **self._examine(frame.fields))
        elif frame.kind == "start":
            self._start(frame.fields)
        elif frame.kind == "signal" and self._crew is not None:
            self._crew.send(signal.Signals(frame.fields["number"]), to_end=frame.fields["to_end"])
        elif frame.kind == "kill" and self._crew is not None:
            self._crew.kill()
        elif frame.kind == "forget" and self._crew is not None:
            self._crew.forget()

    def _examine(self, request: Mapping[str, Any]) -> dict[str, Any]:
        os.environ.update(request["environ"])
        try:
            os.chdir(request["folder"])
        except OSError as error:
            return {"error": f"the working directory {request['folder']!r} cannot be used: {error.strerror}"}
        try:
            return {
                **gather(request["form"], request["script"], request["files"]),
                "port": free_port("") if request["port"] else None,
            }
        except LaunchError as error:
            return {"error": str(error)}

    def _start(self, request: Mapping[str, Any]) -> None:
        self._grace_s = request["grace_s"]
        self._link.pulse = Pulse(timeout_s=request["timeout_s"])
        slots: list[int] = request["slots"]
        environ = {**os.environ, VISIBLE: visible(os.environ.get(VISIBLE), slots)}
        part = Part(**request["part"], interface=interface_towards(request["towards"]))
        plan = make_plan(
            python=request["python"],
            target=request["target"],
            part=part,
            environ=environ,
            cores=usable_cores(),
        )
        try:
            if request["bind"] is not None:
                cores = parse_cores(request["bind"], core_numbers())
                plan = bind_cores(plan, cores, keep_threads="OMP_NUM_THREADS" in os.environ)
            self._crew = LocalCrew(plan, self._outputs_of, terminal=False)
            self._crew.start(self._outputs)
        except LaunchError as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(f"cannot start {plan.command[0]}: {error.strerror}")

    def _fail(self, reason: str) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None
        self._link.send("failed", reason=reason)

    def _outputs_of(self, rank: int) -> Outputs:
        return Outputs(
            stdout=_FrameSink(self._link, rank, "stdout"), stderr=_FrameSink(self._link, rank, "stderr")
        )

    def _report(self) -> None:
        for end in self._crew.collect() if self._crew is not None else ():
            self._link.send(
                "ended",
                rank=end.rank,
                pid=end.pid,
                returncode=end.returncode,
                ended_by_us=end.ended_by_us,
                oom_killed=end.oom_killed,
                memory=end.memory,
            )

    def _status(self) -> dict[str, Any]:
        return {"stopped": self._crew.stopped() if self._crew is not None else []}

    def _act_on(self, number: signal.Signals) -> None:
        if number in FORWARDED and self._crew is not None:
            self._crew.send(number, to_end=False)
        elif number in STOPPING:
            self._end()

    def _end(self) -> None:
        """Ends the ranks; a second call does nothing."""
        if self._is_ending:
            return
        self._is_ending = True
        self._deadline_s = time.monotonic() + self._grace_s
        if self._crew is not None:
            self._crew.send(signal.SIGTERM)
            self._crew.send(signal.SIGCONT)  # a stopped rank gets SIGTERM only when it continues


def main() -> None:
    """Serves one launcher."""
    receive, send = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a library prints must not come between the frames
    if sys.platform != "win32":
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        os.write(send, MAGIC)
        Agent(receive, send).run()


if __name__ == "__main__":
    main()
