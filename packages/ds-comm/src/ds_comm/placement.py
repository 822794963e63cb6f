"""Determines the rank of this process from the environment variables of its launcher: a pure function.

Order of the readers, and why:
0. A pod of Kubeflow's operators that runs the script without torchrun, and so lacks LOCAL_RANK.
1. torchrun's variables (also `ds run`, Kubernetes operators): a launcher that runs inside an allocation sets
   them for its own processes, while the allocation's variables are inherited from outside.
2. Open MPI: its daemons may themselves be started by srun, so that SLURM_PROCID is then the daemon's number.
3. MPICH and Intel MPI (PMI_RANK), unless it is srun that provides PMI: then both agree, and Slurm knows more.
4. Slurm, for processes that srun started.
5. A single process.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ds_comm import kubernetes
from ds_comm.contradictions import ELASTIC, LAUNCHER, refuse_contradictions
from ds_comm.nodelist import expand_counts, expand_nodes
from ds_comm.variables import LOOPBACK, PlacementError, Variables

_DEFAULT_PORT = 29500  # torch's own


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The rank of this process in its job, and the address of rank 0."""

    rank: int
    """0 <= rank < world_size."""
    world_size: int
    """Number of processes of the job."""
    local_rank: int
    """0 <= local_rank < local_size: number of this process on its machine."""
    local_size: int
    """Number of processes of the job on this machine."""
    master_addr: str
    """Host on which rank 0 listens for the other ranks."""
    master_port: int
    """TCP port on that host; 0 for a single process, which opens none."""
    source: str
    """Launcher that set the variables: "torchrun" (or another launcher with its variables), "ds run", "slurm", "mpi",
    "kubernetes" (a pod without torchrun), or "single" if there is none.
    """
    variables: tuple[str, ...] = field(default=(), compare=False)
    """The environment variables from which this was read, as NAME=value."""

    def __post_init__(self) -> None:
        """Raises PlacementError if the numbers contradict each other."""
        if not 0 <= self.rank < self.world_size:
            raise PlacementError(
                f"{self.source}: rank {self.rank} must be less than the number of ranks, {self.world_size}; "
                f"ranks count from 0. Is a variable left over from another job?"
            )
        if not 0 <= self.local_rank < self.local_size <= self.world_size:
            raise PlacementError(
                f"{self.source}: local rank {self.local_rank} of {self.local_size} on this machine does not "
                f"fit into {self.world_size} ranks: 0 <= local rank < local size <= number of ranks must "
                f"hold. Is a variable left over from another job?"
            )

    def __str__(self) -> str:
        """Says who this rank is, who the others are, and by which variables."""
        if self.world_size == 1:
            return f"a single process ({', '.join(self.variables) or 'no launcher has set a variable'})"
        return (
            f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_size} on this "
            f"machine, rank 0 at {self.master_addr}:{self.master_port}; by {self.source}: {', '.join(self.variables)}"
        )


def detect(environ: Mapping[str, str]) -> Placement:
    """Reads the placement of this process from `environ` (usually os.environ).

    Raises PlacementError if the variables of that launcher are incomplete, not numbers, or contradictory, or if two
    launchers contradict each other.
    """
    refuse_contradictions(Variables(environ))
    for reader in (_from_pod, _from_torchrun, _from_open_mpi, _from_pmi, _from_slurm):
        env = Variables(environ)
        placement = reader(env)
        if placement is not None:
            return replace(placement, variables=tuple(f"{name}={value}" for name, value in env.read.items()))
    return Placement(
        rank=0,
        world_size=1,
        local_rank=0,
        local_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        source="single",
    )


def _from_pod(env: Variables) -> Placement | None:
    pod = kubernetes.pod(env)
    if pod is None:
        return None
    return Placement(
        rank=pod.rank,
        world_size=pod.world_size,
        local_rank=0,
        local_size=1,
        master_addr=pod.master_addr,
        master_port=pod.master_port if pod.world_size > 1 else 0,
        source="kubernetes",
    )


def _from_torchrun(env: Variables) -> Placement | None:
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    start = "start with `ds run` or `torchrun`, which set all of them"
    unset = f"{start}, or unset RANK and WORLD_SIZE to run a single process"
    world_size = env.number("WORLD_SIZE", unset)
    if world_size == 1 and "RANK" not in env:  # some clusters export WORLD_SIZE=1 for single jobs
        return None
    rank = env.number("RANK", unset)
    if world_size == 1:
        local_rank, local_size = 0, 1
        if "LOCAL_RANK" in env:
            local_rank = env.number("LOCAL_RANK", start)
    else:
        # torch.multiprocessing.spawn and notebooks set only the variables that torch needs. If the address of rank 0
        # is a loopback address, all ranks are on this machine.
        here = "MASTER_ADDR" in env and env.text("MASTER_ADDR", start) in LOOPBACK
        own = f"{start}, or set it yourself: LOCAL_RANK counts the processes of one machine from 0, "
        own += "LOCAL_WORLD_SIZE is their number (0 and 1 where each machine runs one process)"
        local_rank = rank if here and "LOCAL_RANK" not in env else env.number("LOCAL_RANK", own)
        alone_here = here and "LOCAL_WORLD_SIZE" not in env
        local_size = world_size if alone_here else env.number("LOCAL_WORLD_SIZE", own)
    alone = world_size == 1
    host = f"set it to the host name of the machine with rank 0, or {start}"
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr="127.0.0.1" if alone else env.text("MASTER_ADDR", host),
        master_port=0
        if alone
        else env.port(lambda: env.number("MASTER_PORT", f"set it to a free port, or {start}")),
        source=_source(env),
    )


def _source(env: Variables) -> str:
    """Names the launcher. `ds run` sets torchrun's variables and one of its own; torchrun inside `ds run` sets one
    more.
    """
    if LAUNCHER in env and ELASTIC not in env:
        return env.text(LAUNCHER, "set it to the launcher's name, or unset it")
    return "torchrun"


def _from_open_mpi(env: Variables) -> Placement | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    remedy = "start the processes with mpirun, which sets it"
    names = (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    )
    return _from_mpi(env, *(env.number(name, remedy) for name in names), forward="mpirun -x MASTER_ADDR=")


def _from_pmi(env: Variables) -> Placement | None:
    """Reads the variables of MPICH's Hydra and of Intel MPI, which are the same."""
    if "PMI_RANK" not in env:
        return None
    remedy = "start the processes with mpiexec, which sets it"
    rank, world_size = env.number("PMI_RANK", remedy), env.number("PMI_SIZE", remedy)
    if "MPI_LOCALRANKID" not in env and "SLURM_PROCID" in env:
        return None  # `srun --mpi=pmi2`: Slurm's own variables contain the same and more
    local_rank, local_size = env.number("MPI_LOCALRANKID", remedy), env.number("MPI_LOCALNRANKS", remedy)
    return _from_mpi(env, rank, world_size, local_rank, local_size, forward="mpiexec -genv MASTER_ADDR ")


def _from_mpi(
    env: Variables, rank: int, world_size: int, local_rank: int, local_size: int, *, forward: str
) -> Placement:
    """MPI sets rank and world size, but not the host of rank 0. That host is known only if all ranks are on this
    machine.
    """
    if "MASTER_ADDR" not in env and local_size < world_size:
        raise PlacementError(
            f"the environment variable MASTER_ADDR is missing, and {world_size} ranks span several machines "
            f"({local_size} on this one): add `{forward}<host of rank 0>` to the command, and MASTER_PORT "
            f"likewise if port {_DEFAULT_PORT} is taken there"
        )
    job = env.text("PMIX_NAMESPACE", "") if "PMIX_NAMESPACE" in env else ""
    alone = world_size == 1
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=env.text("MASTER_ADDR", "") if "MASTER_ADDR" in env else "127.0.0.1",
        master_port=0 if alone else env.port(lambda: _port_of_job(job) if job else _DEFAULT_PORT),
        source="mpi",
    )


def _from_slurm(env: Variables) -> Placement | None:
    if "SLURM_PROCID" not in env:
        return None  # also set in the shell of salloc, from which users start a single process
    count_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    remedy = "start the processes with srun, which sets it"
    if "SLURM_STEP_NODELIST" not in env:  # the batch script itself, which was not started by srun
        if count_name not in env or env.number(count_name, remedy) == 1:
            return None
        raise PlacementError(
            f"{count_name}={env.number(count_name, remedy)}, but this process was not started by srun (the "
            f"variable SLURM_STEP_NODELIST is missing), so the other ranks do not exist: write `srun python "
            f"...` in the batch script, or unset SLURM_PROCID to run a single process"
        )
    rank, world_size = env.number("SLURM_PROCID", remedy), env.number(count_name, remedy)
    nodes = env.parsed("SLURM_STEP_NODELIST", expand_nodes, remedy)
    job = f"{env.text('SLURM_JOB_ID', remedy)}.{env.text('SLURM_STEP_ID', remedy)}"
    alone = world_size == 1
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=env.number("SLURM_LOCALID", remedy),
        local_size=_slurm_local_size(env, len(nodes), remedy),
        master_addr=env.text("MASTER_ADDR", "") if "MASTER_ADDR" in env else nodes[0],
        master_port=0 if alone else env.port(lambda: _port_of_job(job)),
        source="slurm",
    )


def _slurm_local_size(env: Variables, num_nodes: int, remedy: str) -> int:
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_TASKS_PER_NODE"
    counts = env.parsed(name, expand_counts, remedy)
    node = env.number("SLURM_NODEID", remedy)
    if not 0 <= node < len(counts) or len(counts) != num_nodes:
        raise PlacementError(
            f"SLURM_NODEID={node}, {num_nodes} hosts in SLURM_STEP_NODELIST and {len(counts)} counts in "
            f"{name} contradict each other: {remedy}"
        )
    return counts[node]


def _port_of_job(job: str) -> int:
    """Computes a port from the job id: the same on all ranks, different for most other jobs, and below the ephemeral
    ports.
    """
    return 20_000 + zlib.crc32(job.encode()) % 10_000
