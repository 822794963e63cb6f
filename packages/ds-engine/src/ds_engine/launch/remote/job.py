"""The plan of a job on several machines: a value, computed without starting anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_engine.launch.hosts import Pool
from ds_engine.launch.network import is_loopback, is_this_machine
from ds_engine.launch.plan import LaunchError

FORWARDED_PREFIXES = (
    *("NCCL_", "GLOO_", "OMP_", "MKL_", "CUDA_", "UCX", "MV2"),
    *("PYTHON", "TORCH", "DS_", "HF_", "MLFLOW"),
)
"""Environment variables that begin with one of these are set on every machine as they are here."""
FORWARDED_NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "TOKENIZERS_PARALLELISM"})
"""Further variables that are set on every machine as they are here."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the numbers of the accelerators that a process may use."""
_NOT_FORWARDED = frozenset({VISIBLE, "DS_LAUNCHER", "HF_TOKEN"})
# A name that begins with "-" would be read as an option of ssh; other characters have a meaning for shells.
_HOST_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*")


@dataclass(frozen=True, kw_only=True)
class HostShare:
    """What one machine runs."""

    host: str
    """Its name, as in the host file."""
    slots: tuple[int, ...]
    """Numbers of its accelerators, one for each rank."""
    first_rank: int
    """Rank of the process of the first slot; the others follow."""
    node_rank: int
    """Number of the machine, from 0."""

    @property
    def ranks(self) -> range:
        """Ranks of its processes."""
        return range(self.first_rank, self.first_rank + len(self.slots))


@dataclass(frozen=True, kw_only=True)
class Program:
    """What every rank runs."""

    script: str
    """Python file, module or program."""
    target: tuple[str, ...]
    """Arguments of the interpreter, or the program and its arguments."""
    kind: str
    """"script", "module" or "program"."""
    files: tuple[str, ...]
    """Files that must exist on every machine with the same contents."""
    folder: str
    """Working directory, on every machine."""
    python: str
    """Path of the interpreter on every machine."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A job on several machines."""

    shares: tuple[HostShare, ...]
    """The machines in the order of their ranks."""
    program: Program
    """What every rank runs."""
    environ: Mapping[str, str]
    """Variables that are set on every machine."""
    master_addr: str
    """Address of rank 0's machine, as the others see it."""
    master_port: int | None
    """TCP port on which rank 0 listens; None: a free one, chosen on its machine."""

    bind: str | None = None
    """List of cores, such as "0-3,8", that are divided among the ranks of a machine; "" for all; None: not bound."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(len(share.slots) for share in self.shares)

    @property
    def is_here(self) -> bool:
        """Whether its only machine is this one."""
        return len(self.shares) == 1 and is_this_machine(self.shares[0].host)

    def outlook(self, node_rank: int) -> str | None:
        """Returns the address that shows which network interface a machine uses for the job: that of rank 0's machine.
        The first machine would reach its own address over the loopback interface, so it takes another one's; None if
        there is no other.
        """
        if len(self.shares) == 1:
            return None
        if node_rank > 0:
            return self.master_addr
        return self.shares[1].host.rpartition("@")[2]


def first_slots(pool: Pool, *, num_nodes: int | None, nproc: int | None) -> Pool:
    """Returns the first machines, and the first slots of each.

    Raises LaunchError if there are fewer.
    """
    if num_nodes is not None and not 1 <= num_nodes <= len(pool):
        raise LaunchError(
            f"--num-nodes {num_nodes}: between 1 and {len(pool)} are possible, the machines of the host file"
        )
    if nproc is not None and nproc < 1:
        raise LaunchError(f"--nproc {nproc}: at least one process on each machine is required")
    chosen = dict(list(pool.items())[:num_nodes])
    for host, slots in chosen.items():
        if nproc is not None and nproc > len(slots):
            raise LaunchError(
                f"--nproc {nproc}: host {host} has {len(slots)} slots; correct the host file, or leave the host out"
            )
    return {host: slots[:nproc] for host, slots in chosen.items()}


def make_shares(pool: Mapping[str, Sequence[int]]) -> tuple[HostShare, ...]:
    """Distributes the ranks over the machines in their order, one for each slot.

    Raises LaunchError if a machine has an invalid name or no slot.
    """
    shares: list[HostShare] = []
    first_rank = 0
    for node_rank, (host, slots) in enumerate(pool.items()):
        check_host_name(host)
        if not slots:
            raise LaunchError(
                f"host {host} has slots=0: remove it from the host file, or use --exclude {host}"
            )
        shares.append(HostShare(host=host, slots=tuple(slots), first_rank=first_rank, node_rank=node_rank))
        first_rank += len(slots)
    return tuple(shares)


def check_host_name(host: str) -> None:
    """Raises LaunchError if ssh or a shell could read the name as something else."""
    if _HOST_NAME.fullmatch(host) is None:
        raise LaunchError(
            f"{host!r} is not a name of a host: letters, digits and '.', '-', '_', ':' are possible, after an "
            "optional user@"
        )


def choose_master(pool: Pool | Sequence[str], wish: str) -> str:
    """Returns the address of rank 0's machine as the others see it: `wish`, or the first machine's name.

    Raises LaunchError if that name means another machine on each machine.
    """
    hosts = list(pool)
    name = wish or hosts[0].rpartition("@")[2]
    if len(hosts) > 1 and is_loopback(name):
        raise LaunchError(
            f"{name} is the address of rank 0's machine, but on the other {len(hosts) - 1} machines it means those "
            "themselves: write its name in the network into the host file, or set --master-addr"
        )
    return name


def forwarded(environ: Mapping[str, str], names: Sequence[str] = ()) -> dict[str, str]:
    """Returns the variables of `environ` that are set on every machine: see FORWARDED_PREFIXES, and `names`.

    Raises LaunchError if one of `names` is not set.
    """
    for name in names:
        if name not in environ:
            raise LaunchError(f"--export {name}: this variable is not set here")
    return {
        name: value
        for name, value in environ.items()
        if name in names
        or name in FORWARDED_NAMES
        or (name.startswith(FORWARDED_PREFIXES) and name not in _NOT_FORWARDED)
    }


def visible(allowed: str | None, slots: Sequence[int]) -> str:
    """Returns the accelerators of these slots, as numbers among those that the machine allows (its own VISIBLE)."""
    names = allowed.split(",") if allowed else []
    return ",".join(names[slot] if slot < len(names) else str(slot) for slot in slots)
