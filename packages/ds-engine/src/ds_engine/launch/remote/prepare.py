"""`ds run` on several machines: over ssh from a host file, or one command on every machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_engine.launch.devices import count_accelerators
from ds_engine.launch.hosts import Pool, fetch_hostfile, parse_resource_filter, read_env_files
from ds_engine.launch.local import check_config, check_exists, target_of
from ds_engine.launch.machine import core_numbers, usable_cores
from ds_engine.launch.network import free_port, interface_towards
from ds_engine.launch.plan import (
    LaunchError,
    LaunchPlan,
    Part,
    bind_cores,
    choose_nproc,
    make_plan,
    parse_cores,
    refuse_nesting,
)
from ds_engine.launch.remote.job import (
    VISIBLE,
    JobPlan,
    Program,
    choose_master,
    first_slots,
    forwarded,
    make_shares,
    visible,
)

ENV_FILE = ".deepspeed_env"
"""Files of this name in the home and working directories add variables for every machine."""
_DEFAULT_PORT = 29500  # torchrun's own


@dataclass(frozen=True, kw_only=True)
class Script:
    """What the user wants every rank to run."""

    name: str
    """Python file, module or program."""
    arguments: Sequence[str] = ()
    """Passed to it unchanged."""
    kind: str = "script"
    """"script", "module" or "program"."""
    config: str | None = None
    """A configuration file, passed to it as --config FILE before its own arguments."""

    @property
    def target(self) -> list[str]:
        """Returns the arguments of the interpreter."""
        return target_of(self.name, self.arguments, module=self.kind == "module", config=self.config)

    def check(self) -> None:
        """Raises LaunchError if it does not exist on this machine."""
        check_exists(self.name, self.kind == "module", self.kind == "program")
        check_config(self.config)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which machines and slots of a host file the job uses."""

    hostfile: str
    """Path of the host file."""
    include: str = ""
    """NODE[:SLOT[,SLOT]...][@NODE...]: only these."""
    exclude: str = ""
    """All except these."""
    num_nodes: int | None = None
    """Only the first machines."""
    nproc: int | None = None
    """Only the first slots of each machine."""

    def pool(self) -> Pool:
        """Returns the machines and slots of the job; raises as `candidates` does."""
        return first_slots(self.candidates(), num_nodes=self.num_nodes, nproc=None)

    def candidates(self) -> Pool:
        """Reads the host file, and applies the filters. More machines than `num_nodes` are spares.

        Raises:
            LaunchError: there is no such file.
            ValueError: a line or a filter is malformed, or names a host or slot that does not exist.
        """
        listed = fetch_hostfile(self.hostfile)
        if listed is None:
            raise LaunchError(f"--hostfile {self.hostfile}: there is no such file")
        for host, slots in listed.items():
            if not slots:
                raise LaunchError(
                    f"{self.hostfile}: host {host} has slots=0; remove the line, or give it slots"
                )
        pool = parse_resource_filter(listed, self.include, self.exclude)
        if not pool:
            raise LaunchError(f"--include/--exclude leave no slot of {self.hostfile}")
        return first_slots(pool, num_nodes=None, nproc=self.nproc)


def plan_job(
    script: Script,
    pool: Mapping[str, Sequence[int]],
    *,
    master_addr: str = "",
    master_port: int | None = None,
    export: Sequence[str] = (),
    python: str = sys.executable,
    environ: Mapping[str, str] | None = None,
    env_file: str = ENV_FILE,
) -> JobPlan:
    """Plans a job on these machines, with a rank for each slot.

    Raises LaunchError or ValueError if the job cannot run.
    """
    environ = os.environ if environ is None else environ
    refuse_nesting(environ)
    script.check()
    shares = make_shares(pool)
    files = [script.name] if script.kind == "script" else []
    return JobPlan(
        shares=shares,
        program=Program(
            script=script.name,
            target=tuple(script.target),
            kind=script.kind,
            files=(*files, *([script.config] if script.config is not None else [])),
            folder=_current_folder(environ),
            python=python,
        ),
        environ={**forwarded(environ, export), **read_env_files(env_file)},
        master_addr=choose_master([share.host for share in shares], master_addr),
        master_port=master_port,
    )


def plan_share(job: JobPlan, node_rank: int) -> LaunchPlan:
    """Plans the ranks of one machine of a job, which is started by one command on each machine.

    Raises LaunchError if the job has no such machine.
    """
    if not 0 <= node_rank < len(job.shares):
        raise LaunchError(
            f"the number of this machine is {node_rank}, but the job has the machines 0 to {len(job.shares) - 1}: "
            "give each its own (--node_rank)"
        )
    share = job.shares[node_rank]
    alone = len(job.shares) == 1
    environ = {**os.environ, **job.environ, VISIBLE: visible(os.environ.get(VISIBLE), share.slots)}
    plan = make_plan(
        python=None if job.program.kind == "program" else job.program.python,
        target=job.program.target,
        part=Part(
            nproc=len(share.slots),
            first_rank=share.first_rank,
            world_size=job.world_size,
            node_rank=node_rank,
            master_addr="127.0.0.1" if alone else job.master_addr,
            master_port=job.master_port or (free_port() if alone else _DEFAULT_PORT),
            interface=interface_towards(job.outlook(node_rank)),
        ),
        reason=f"machine {node_rank} of {len(job.shares)}, {share.host}",
        environ=environ,
        cores=usable_cores(),
    )
    if job.bind is None:
        return plan
    return bind_cores(plan, parse_cores(job.bind, core_numbers()), keep_threads="OMP_NUM_THREADS" in environ)


def plan_node(
    script: Script,
    *,
    nnodes: int,
    node_rank: int | None,
    endpoint: str | None,
    nproc: int | None,
    environ: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Plans the ranks of this machine, for a job that is started by one command on each of `nnodes` machines.

    endpoint: HOST[:PORT] of the machine with node rank 0.

    Raises LaunchError if the job cannot run.
    """
    environ = os.environ if environ is None else environ
    refuse_nesting(environ)
    script.check()
    if nnodes < 1:
        raise LaunchError(f"--nnodes {nnodes}: at least one machine is required")
    if node_rank is None or not 0 <= node_rank < nnodes:
        raise LaunchError(
            f"--node-rank {'is missing' if node_rank is None else node_rank}: with --nnodes {nnodes}, each machine "
            f"needs its own number from 0 to {nnodes - 1}"
        )
    if endpoint is None:
        raise LaunchError(
            "--rdzv-endpoint is missing: name the machine with --node-rank 0 and a free port there, for example "
            f"host-a:{_DEFAULT_PORT}, the same on every machine"
        )
    address, port = _split_endpoint(endpoint)
    choose_master([address] * nnodes, "")
    count, reason = choose_nproc(nproc, 0 if nproc is not None else count_accelerators(), usable_cores())
    return make_plan(
        python=None if script.kind == "program" else sys.executable,
        target=script.target,
        part=Part(
            nproc=count,
            first_rank=node_rank * count,
            world_size=nnodes * count,
            node_rank=node_rank,
            master_addr=address,
            master_port=port,
            interface=interface_towards(address),
        ),
        reason=f"machine {node_rank} of {nnodes}; {reason}, the same number on each",
        environ=environ,
        cores=usable_cores(),
    )


def _split_endpoint(endpoint: str) -> tuple[str, int]:
    """Splits HOST[:PORT]; an IPv6 address with a port stands in brackets."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = endpoint, str(_DEFAULT_PORT)
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"--rdzv-endpoint {endpoint!r}: write HOST:PORT, with a port from 1 to 65535")
    return host, int(port)


def _current_folder(environ: Mapping[str, str]) -> str:
    """Returns the working directory as the user knows it: other machines may reach it through the same links."""
    named = environ.get("PWD", "")
    return named if Path(named).is_dir() and Path(named).samefile(os.curdir) else os.getcwd()
