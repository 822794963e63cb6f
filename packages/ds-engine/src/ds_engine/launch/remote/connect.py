"""Runs a job on several machines: connects to all of them, compares them, and starts the ranks."""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ds_engine.launch.console import Console
from ds_engine.launch.plan import LaunchError, Part
from ds_engine.launch.remote.facts import differences, gather
from ds_engine.launch.remote.job import JobPlan
from ds_engine.launch.remote.link import Pulse
from ds_engine.launch.remote.ranks import RemoteCrew, RemoteHost, Start, close_all
from ds_engine.launch.remote.transport import Transport
from ds_engine.launch.restart import UnusableHostsError
from ds_engine.launch.supervise import Outcome, Patience, Supervisor

_REPORT_S = 5.0
"""Seconds after which the machines that have not answered are named."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How the job is watched."""

    say: Callable[[str], None]
    """Is called with each line for the user."""
    console: Console
    """Where the output of the ranks goes."""
    patience: Patience = field(default_factory=Patience)
    """Time limits."""
    pulse: Pulse = field(default_factory=Pulse)
    """When a machine is considered lost."""
    is_last: bool = False
    """Whether the job will not be started again after a failure."""


def run_on_hosts(job: JobPlan, transport: Transport, watch: Watch) -> Outcome:
    """Runs the job, and returns how it ended.

    Raises UnusableHostsError, before any rank is started, if a machine cannot be reached or differs from this one. The
    message names every such machine.
    """
    selector = selectors.DefaultSelector()
    hosts: list[RemoteHost] = []
    try:
        for share in job.shares:
            hosts.append(RemoteHost(share, transport.command(share.host), selector))  # noqa: PERF401  those made so far are closed if one fails
        ask = {
            "environ": dict(job.environ),
            "folder": job.program.folder,
            "form": job.program.kind,
            "script": job.program.script,
            "files": list(job.program.files),
        }
        for host in hosts:
            host.link.send("examine", **ask, port=host is hosts[0] and job.master_port is None)
        _wait_for_hello(hosts, selector, watch.say)
        ours = gather(job.program.kind, job.program.script, job.program.files)
        problems = {host.name: _problems(host, ours, job) for host in hosts}
        lines = [line for of_host in problems.values() for line in of_host]
        if lines:
            unreachable = [
                host.name for host in hosts if host.hello is None or host.lost_because() is not None
            ]
            others = any(of_host for name, of_host in problems.items() if name not in unreachable)
            raise UnusableHostsError(
                "\n  ".join(["the job does not start on any machine:", *lines]), [] if others else unreachable
            )
    except BaseException as error:
        close_all(hosts)
        selector.close()
        if isinstance(error, OSError):
            raise LaunchError(f"cannot start {error.filename}: {error.strerror}") from None
        raise
    port = job.master_port if job.master_port is not None else _hello(hosts[0])["port"]
    watch.say(_summary(job, port))
    crew = RemoteCrew(
        hosts,
        Start(
            requests=[_start_request(job, node_rank, port, watch) for node_rank in range(len(hosts))],
            pulse=watch.pulse,
            outputs_of=watch.console.outputs_of,
        ),
        watch.say,
    )
    supervisor = Supervisor(crew, watch.say, watch.patience, is_last=watch.is_last)

    def while_blocked() -> None:
        crew.keep_alive()
        supervisor.act_on_signals()

    watch.console.while_blocked = while_blocked
    # While the launcher is suspended it sends no heartbeats, so the machines would end the job.
    previous = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        return supervisor.run(selector)
    finally:
        signal.signal(signal.SIGTSTP, previous)


def _wait_for_hello(
    hosts: Sequence[RemoteHost], selector: selectors.BaseSelector, say: Callable[[str], None]
) -> None:
    report_s = time.monotonic() + _REPORT_S
    while missing := [host.name for host in hosts if host.hello is None and host.link.closed is None]:
        if time.monotonic() >= report_s:
            say(f"waiting for {', '.join(missing)}")
            report_s = float("inf")
        left_s = min(report_s, *(host.link.due_s for host in hosts)) - time.monotonic()
        for key, _ in selector.select(timeout=max(0.0, left_s)):
            key.data(key.fd)
        for host in hosts:
            host.link.beat()


def _hello(host: RemoteHost) -> Mapping[str, Any]:
    assert host.hello is not None
    return host.hello


def _problems(host: RemoteHost, ours: Mapping[str, Any], job: JobPlan) -> list[str]:
    lost = host.lost_because()
    if host.hello is None or lost is not None:
        return [f"{host.name} cannot be used: {lost}"]
    if "error" in host.hello:
        return [f"{host.name}: {host.hello['error']}"]
    return differences(
        host.name,
        host.hello,
        ours,
        script=job.program.script,
        folder=job.program.folder,
        slots=host.share.slots,
    )


def _start_request(job: JobPlan, node_rank: int, port: int, watch: Watch) -> dict[str, Any]:
    share = job.shares[node_rank]
    part = Part(
        nproc=len(share.slots),
        first_rank=share.first_rank,
        world_size=job.world_size,
        node_rank=node_rank,
        master_addr=job.master_addr,
        master_port=port,
        interface=None,
    )
    return {
        "part": {name: value for name, value in asdict(part).items() if name != "interface"},
        "slots": list(share.slots),
        "python": None if job.program.kind == "program" else job.program.python,
        "target": list(job.program.target),
        "towards": job.outlook(node_rank),
        "bind": job.bind,
        "grace_s": watch.patience.grace_s,
        "timeout_s": watch.pulse.timeout_s,
    }


def _summary(job: JobPlan, port: int) -> str:
    machines = ", ".join(f"{share.host}: {len(share.slots)}" for share in job.shares)
    command = " ".join(job.program.target).replace("\n", " ")
    return (
        f"{job.world_size} ranks on {len(job.shares)} machines ({machines}), rank 0 at {job.master_addr}:{port}: "
        f"{command}"
    )
