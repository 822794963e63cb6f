"""Refuses environments in which two launchers say different things about the same process.

A launcher inside another one is no contradiction: torchrun inside an allocation of Slurm sets RANK, while SLURM_PROCID
is inherited and counts torchrun's parents. The rules below therefore compare only what must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_comm.variables import PlacementError, Variables

LAUNCHER = "DS_LAUNCHER"
"""Environment variable with the name of a launcher that sets torchrun's variables."""
ELASTIC = "TORCHELASTIC_RUN_ID"
"""Environment variable of torchrun's ranks."""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """The variables with which a launcher numbers its processes."""

    rank: str
    size: str
    """Empty if the launcher does not say."""
    remove: str
    """What to unset if this claim is the wrong one."""


_TORCH = _Claim(rank="RANK", size="WORLD_SIZE", remove="RANK and WORLD_SIZE")
_OPEN_MPI = _Claim(
    rank="OMPI_COMM_WORLD_RANK", size="OMPI_COMM_WORLD_SIZE", remove="the variables that begin with OMPI_"
)
_PMI = _Claim(rank="PMI_RANK", size="PMI_SIZE", remove="the variables that begin with PMI_")
_PMIX = _Claim(rank="PMIX_RANK", size="", remove="the variables that begin with PMIX_")
_SLURM = _Claim(
    rank="SLURM_PROCID", size="SLURM_STEP_NUM_TASKS", remove="the variables that begin with SLURM_"
)


def refuse_contradictions(env: Variables) -> None:
    """Raises PlacementError with both variables and both values if two launchers contradict each other."""
    started_by_torchrun = ELASTIC in env or LAUNCHER in env  # its parents have other numbers
    if not started_by_torchrun and _TORCH.rank in env and _TORCH.size in env:
        _compare_with_mpi(env, _OPEN_MPI)
        if "MPI_LOCALRANKID" in env:
            _compare_with_mpi(env, _PMI)
        if "SLURM_STEP_NODELIST" in env and _same_size(env, _TORCH, _SLURM) and _size(env, _SLURM) > 1:
            # Otherwise a process of the step has started ranks of its own. The usual mistake is `export
            # RANK=$SLURM_PROCID` in the batch script, which is 0 for every process that srun then starts.
            _same(env, _TORCH.rank, _SLURM.rank, _TORCH, _SLURM)
    elif not started_by_torchrun and _OPEN_MPI.rank in env:
        _same(env, _OPEN_MPI.rank, _PMIX.rank, _OPEN_MPI, _PMIX)
        if "MPI_LOCALRANKID" in env:
            _same(env, _OPEN_MPI.rank, _PMI.rank, _OPEN_MPI, _PMI)
            _same(env, _OPEN_MPI.size, _PMI.size, _OPEN_MPI, _PMI)
    elif not started_by_torchrun and "SLURM_STEP_NODELIST" in env and "MPI_LOCALRANKID" not in env:
        for claim in (_PMI, _PMIX):  # provided by srun, for its own processes
            _same(env, _SLURM.rank, claim.rank, _SLURM, claim)
        _same(env, _SLURM.size, _PMI.size, _SLURM, _PMI)


def _compare_with_mpi(env: Variables, mpi: _Claim) -> None:
    """Compares RANK and WORLD_SIZE with mpirun's, unless each process of mpirun may have started as many ranks."""
    if mpi.rank not in env or mpi.size not in env:
        return
    ranks, processes = _size(env, _TORCH), _size(env, mpi)
    if ranks == processes:
        _same(env, _TORCH.rank, mpi.rank, _TORCH, mpi)
    elif ranks < processes or ranks % max(1, processes):
        _same(env, _TORCH.size, mpi.size, _TORCH, mpi)


def _size(env: Variables, claim: _Claim) -> int:
    return env.number(claim.size, f"unset {claim.remove}")


def _same_size(env: Variables, first: _Claim, second: _Claim) -> bool:
    return second.size in env and _size(env, first) == _size(env, second)


def _same(env: Variables, first: str, second: str, claim: _Claim, other: _Claim) -> None:
    """Raises if two variables that must be equal both exist and differ."""
    if first not in env or second not in env:
        return
    values = [
        env.number(name, "unset it, or start the processes with one launcher") for name in (first, second)
    ]
    if values[0] != values[1]:
        raise PlacementError(
            f"{first}={values[0]} and {second}={values[1]} contradict each other: two launchers say different things "
            f"about this process. Unset {claim.remove} if they are left over, or else {other.remove}"
        )
