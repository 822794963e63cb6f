"""`ds run`: starts a job on this machine, on the machines of a host file, or this machine's part of a job."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ds_engine.cli.emit import Emission, EmitOption, GpusOption, ImageOption, show_emitted

if TYPE_CHECKING:
    from ds_engine.launch.console import Console
    from ds_engine.launch.hosts import Pool
    from ds_engine.launch.plan import LaunchPlan
    from ds_engine.launch.remote.prepare import Script, Selection
    from ds_engine.launch.restart import Restarts
    from ds_engine.launch.supervise import Outcome, Patience

_SEVERAL = "Several machines, over ssh"
_AGAIN = "After a failure"
_EACH = "Several machines, one command on each"
_Script = Annotated[
    str, typer.Argument(help="Python file to run on every rank (or a module, with --module).")
]
_Arguments = Annotated[list[str] | None, typer.Argument(help="Passed to the script unchanged.")]
_Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "-n",
        "--nproc-per-node",
        help="Number of processes on each machine. Default: one per accelerator, or 2 on a machine without one; with "
        "--hostfile, one per slot.",
    ),
]
_Config = Annotated[
    str | None, typer.Option("--config", help="A ds_config.json, passed to the script as --config FILE.")
]
_Module = Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is the name of a module.")]
_Grace = Annotated[
    float, typer.Option("--grace", help="Seconds between SIGTERM and SIGKILL when ranks are terminated.")
]
_StopGrace = Annotated[
    float,
    typer.Option("--stop-grace", help="Seconds that ranks have to save and exit after Ctrl-C or SIGTERM."),
]
_LogDir = Annotated[
    str | None,
    typer.Option("--log-dir", help="Folder for a file with the output of each rank: JOB/rank_0.log, ..."),
]
_Show = Annotated[
    str | None,
    typer.Option(
        "--show", help="Ranks whose output is shown: all, or 0. Default: 0 with --log-dir, else all."
    ),
]
_Hostfile = Annotated[
    str | None,
    typer.Option(
        "--hostfile",
        "-H",
        help="File with a line `NAME slots=COUNT` for each machine.",
        rich_help_panel=_SEVERAL,
    ),
]
_Include = Annotated[
    str,
    typer.Option(
        help="NODE[:SLOT[,SLOT]...][@NODE...]: use only these machines and slots.", rich_help_panel=_SEVERAL
    ),
]
_Exclude = Annotated[
    str, typer.Option(help="Use all except these, in the same form.", rich_help_panel=_SEVERAL)
]
_NumNodes = Annotated[
    int | None, typer.Option("--num-nodes", help="Use only the first machines.", rich_help_panel=_SEVERAL)
]
_MasterAddr = Annotated[
    str,
    typer.Option(
        help="Address of the machine of rank 0, as the others see it. Default: its name in the host file.",
        rich_help_panel=_SEVERAL,
    ),
]
_MasterPort = Annotated[
    int | None,
    typer.Option(help="TCP port on which rank 0 listens. Default: a free one.", rich_help_panel=_SEVERAL),
]
_LauncherArgs = Annotated[
    str, typer.Option(help="Further arguments of ssh, as one word.", rich_help_panel=_SEVERAL)
]
_SshPort = Annotated[int | None, typer.Option(help="Port of the ssh servers.", rich_help_panel=_SEVERAL)]
_HostTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds without a heartbeat after which a machine is lost, and the job ends.",
        rich_help_panel=_SEVERAL,
    ),
]
_Export = Annotated[
    list[str] | None,
    typer.Option(help="A further variable to set on every machine as it is here.", rich_help_panel=_SEVERAL),
]
_Python = Annotated[
    str,
    typer.Option(
        help="Path of the interpreter on the machines. Default: this one's.", rich_help_panel=_SEVERAL
    ),
]
_MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        help="How often the job is started again after a failure, without the machines that were lost.",
        rich_help_panel=_AGAIN,
    ),
]
_MinNodes = Annotated[
    int | None,
    typer.Option(
        "--min-nodes",
        help="Smallest number of machines on which the job may start or go on. Default: as many as it begins with.",
        rich_help_panel=_AGAIN,
    ),
]
_Nnodes = Annotated[int | None, typer.Option("--nnodes", help="Number of machines.", rich_help_panel=_EACH)]
_NodeRank = Annotated[
    int | None, typer.Option("--node-rank", help="Number of this machine, from 0.", rich_help_panel=_EACH)
]
_Endpoint = Annotated[
    str | None,
    typer.Option("--rdzv-endpoint", help="HOST:PORT of the machine with node rank 0.", rich_help_panel=_EACH),
]


def run(
    script: _Script,
    arguments: _Arguments = None,
    nproc: _Nproc = None,
    config: _Config = None,
    module: _Module = False,
    grace_s: _Grace = 10.0,
    stop_s: _StopGrace = 30.0,
    log_dir: _LogDir = None,
    show: _Show = None,
    hostfile: _Hostfile = None,
    include: _Include = "",
    exclude: _Exclude = "",
    num_nodes: _NumNodes = None,
    master_addr: _MasterAddr = "",
    master_port: _MasterPort = None,
    launcher_args: _LauncherArgs = "",
    ssh_port: _SshPort = None,
    host_timeout: _HostTimeout = 60.0,
    export: _Export = None,
    python: _Python = sys.executable,
    max_restarts: _MaxRestarts = 0,
    min_nodes: _MinNodes = None,
    nnodes: _Nnodes = None,
    node_rank: _NodeRank = None,
    rdzv_endpoint: _Endpoint = None,
    emit: EmitOption = None,
    gpus_per_node: GpusOption = None,
    image: ImageOption = "IMAGE",
) -> None:
    """Run a script on all ranks, and terminate all of them if one fails.

    The exit code is that of the rank that failed first, or 128 + n for signal n.
    """
    from ds_engine.launch.remote.prepare import Script, Selection
    from ds_engine.launch.restart import Restarts

    kind = "module" if module else "script"
    what = Script(name=script, arguments=arguments or [], kind=kind, config=config)
    if emit is not None:
        wanted = Emission(emit, nproc, nnodes or num_nodes, gpus_per_node, image, python, export or [])
        raise typer.Exit(show_emitted(what, wanted, say))
    shown = _Shown(grace_s, stop_s, log_dir, show)
    over_ssh: dict[str, object] = {"include": include, "exclude": exclude, "launcher-args": launcher_args}
    over_ssh |= {"ssh-port": ssh_port, "export": export, "master-addr": master_addr}
    over_ssh |= {"num-nodes": num_nodes, "min-nodes": min_nodes}
    on_each = {"nnodes": nnodes, "node-rank": node_rank, "rdzv-endpoint": rdzv_endpoint}
    reach = _Reach(master_addr, master_port, launcher_args, ssh_port, host_timeout, export or [], python)
    try:
        again = Restarts(limit=max_restarts, min_nodes=min_nodes)
        if hostfile is not None:
            _refuse(on_each, "cannot be combined with --hostfile, which starts all machines")
            pool = Selection(
                hostfile=hostfile, include=include, exclude=exclude, num_nodes=num_nodes, nproc=nproc
            )
            code = _on_hosts(what, pool, reach, shown, again)
        else:
            _refuse(over_ssh, "needs --hostfile")
            node = _Node(nnodes, node_rank, rdzv_endpoint)
            code = _here(what, nproc, master_port, node, shown, again)
    except ValueError as error:  # also LaunchError
        say(f"cannot start: {error}")
        code = 2
    raise typer.Exit(code)


@dataclass(frozen=True)
class _Shown:
    grace_s: float
    stop_s: float
    log_dir: str | None
    show: str | None
    is_last: bool = False

    @property
    def patience(self) -> Patience:
        from ds_engine.launch.supervise import Patience

        return Patience(grace_s=self.grace_s, stop_s=self.stop_s)

    def console(self, script: str, *, inherit: bool) -> Console:
        """Makes the sinks of the output, and the folder of the log files."""
        from ds_engine.launch.console import Console, make_log_folder
        from ds_engine.launch.plan import LaunchError

        if self.show not in (None, "all", "0"):
            raise LaunchError(f"--show {self.show}: `all` and `0` are possible")
        folder = make_log_folder(self.log_dir, script) if self.log_dir is not None else None
        if folder is not None:
            say(f"the output of each rank is in {folder}")
        only_rank_0 = self.show == "0" or (self.show is None and folder is not None)
        return Console(say, logs=folder, only_rank_0=only_rank_0, inherit=inherit)


@dataclass(frozen=True)
class _Reach:
    master_addr: str
    master_port: int | None
    launcher_args: str
    ssh_port: int | None
    host_timeout_s: float
    export: list[str]
    python: str


@dataclass(frozen=True)
class _Node:
    nnodes: int | None
    node_rank: int | None
    endpoint: str | None


def _refuse(options: Mapping[str, object], why: str) -> None:
    from ds_engine.launch.plan import LaunchError

    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise LaunchError(f"{', '.join(given)} {why}")


def _on_hosts(script: Script, selection: Selection, reach: _Reach, shown: _Shown, restarts: Restarts) -> int:
    from ds_engine.launch.restart import Candidates, job_name, restart_environ, run_again

    job = job_name(os.environ)
    pool = selection.candidates()
    selection.pool()  # refuses more machines than there are
    candidates = Candidates(pool, selection.num_nodes, restarts, say)

    def start(number: int) -> Outcome:
        environ = {**os.environ, **restart_environ(job, number)}
        last = dataclasses.replace(shown, is_last=number >= restarts.limit)
        return candidates.attempt(lambda chosen: _attempt(script, pool, chosen, reach, last, environ))

    return run_again(start, restarts, say).code


def _attempt(
    script: Script, pool: Pool, chosen: Pool, reach: _Reach, shown: _Shown, environ: Mapping[str, str]
) -> Outcome:
    """Starts the job once, on the chosen machines of a pool."""
    from ds_engine.launch.remote.connect import Watch, run_on_hosts
    from ds_engine.launch.remote.link import Pulse
    from ds_engine.launch.remote.prepare import plan_job, plan_share
    from ds_engine.launch.remote.transport import Transport, split_arguments

    job = plan_job(
        script,
        chosen,
        # The address that was given is that of the first machine of the file.
        master_addr=reach.master_addr if next(iter(chosen)) == next(iter(pool)) else "",
        master_port=reach.master_port,
        export=reach.export,
        python=reach.python,
        environ=environ,
    )
    if job.is_here:
        return _run_here(plan_share(job, 0), script, shown)
    transport = Transport(
        python=reach.python,
        port=reach.ssh_port,
        arguments=split_arguments(reach.launcher_args),
        alive_s=int(reach.host_timeout_s),
    )
    watch = Watch(
        say=say,
        console=shown.console(script.name, inherit=False),
        patience=shown.patience,
        is_last=shown.is_last,
        pulse=Pulse(timeout_s=reach.host_timeout_s),
    )
    return run_on_hosts(job, transport, watch)


def _here(
    script: Script, nproc: int | None, port: int | None, node: _Node, shown: _Shown, restarts: Restarts
) -> int:
    from ds_engine.launch.local import prepare
    from ds_engine.launch.remote.prepare import plan_node
    from ds_engine.launch.restart import job_name, restart_environ, run_again

    job = job_name(os.environ)
    if node.nnodes is not None:
        _refuse(
            {"master-port": port}, "cannot be combined with --nnodes: the port is that of --rdzv-endpoint"
        )
        _refuse({"max-restarts": restarts.limit}, "needs one launcher for all machines: use --hostfile")
        plan = plan_node(
            script, nnodes=node.nnodes, node_rank=node.node_rank, endpoint=node.endpoint, nproc=nproc
        )
        return _run_here(plan, script, shown).code
    _refuse({"node-rank": node.node_rank is not None, "rdzv-endpoint": node.endpoint}, "needs --nnodes")

    def start(number: int) -> Outcome:
        plan = prepare(
            script.name,
            script.arguments,
            nproc=nproc,
            module=script.kind == "module",
            config=script.config,
            port=port,
            environ={**os.environ, **restart_environ(job, number)},
        )
        return _run_here(plan, script, dataclasses.replace(shown, is_last=number >= restarts.limit))

    return run_again(start, restarts, say).code


def _run_here(plan: LaunchPlan, script: Script, shown: _Shown) -> Outcome:
    from ds_engine.launch.supervise import run as run_plan

    console = shown.console(script.name, inherit=True)
    say(f"{plan.num_ranks} rank{'s' * (plan.num_ranks > 1)} ({plan.reason}): {' '.join(plan.command[1:])}")
    return run_plan(plan, say=say, patience=shown.patience, console=console, is_last=shown.is_last)


def say(line: str) -> None:
    """Prints a line of the launcher itself, with a prefix that distinguishes it from the ranks' output."""
    red = sys.stderr.isatty() and ("failed first" in line or "lost first" in line or "cannot start" in line)
    text = f"[ds] {line}".rstrip()
    sys.stderr.write(f"\x1b[1;31m{text}\x1b[0m\n" if red else f"{text}\n")
    sys.stderr.flush()
