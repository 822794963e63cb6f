"""`detect`: every launcher's variables, and what is said when they do not add up."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import ds_comm
from ds_comm import Placement, PlacementError, detect

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1225195521",
}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}


def _without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def _tuple(placement: Placement) -> tuple[object, ...]:
    return dataclasses.astuple(placement)[:7]


def test_torchrun() -> None:
    assert _tuple(detect(TORCHRUN)) == (5, 8, 1, 4, "node1", 29501, "torchrun")


def test_a_single_process() -> None:
    single = (0, 1, 0, 1, "127.0.0.1", 0, "single")
    assert _tuple(detect({})) == single
    assert _tuple(detect({"WORLD_SIZE": "1"})) == single
    assert _tuple(detect({"MASTER_ADDR": "left.over", "LOCAL_RANK": "3"})) == single
    assert _tuple(detect({"RANK": "", "WORLD_SIZE": " "})) == single
    assert _tuple(detect({"RANK": "0", "WORLD_SIZE": "1"})) == (*single[:-1], "torchrun")


def test_open_mpi() -> None:
    placement = detect(OPEN_MPI)
    assert _tuple(placement)[:5] == (1, 2, 1, 2, "127.0.0.1")
    assert placement.source == "mpi"
    assert 20_000 <= placement.master_port < 30_000
    assert detect({**OPEN_MPI, "PMIX_NAMESPACE": "1225195522"}).master_port != placement.master_port
    assert detect({**OPEN_MPI, "MASTER_PORT": "1234"}).master_port == 1234


def test_hydra() -> None:
    assert _tuple(detect(HYDRA)) == (0, 2, 0, 2, "127.0.0.1", 29500, "mpi")


def test_mpi_over_several_machines_needs_an_address() -> None:
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(
        PlacementError, match=r"MASTER_ADDR is missing.*several machines.*mpirun -x MASTER_ADDR="
    ):
        detect(several)
    assert detect({**several, "MASTER_ADDR": "node3"}).master_addr == "node3"
    with pytest.raises(PlacementError, match=r"mpiexec -genv MASTER_ADDR <host of rank 0>"):
        detect({**HYDRA, "PMI_SIZE": "4"})


def test_slurm() -> None:
    placement = detect(SLURM)
    assert _tuple(placement)[:5] == (9, 11, 1, 3, "gpu07")
    assert placement.source == "slurm"
    assert placement.master_port == detect({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port
    assert placement.master_port != detect({**SLURM, "SLURM_STEP_ID": "1"}).master_port
    assert detect({**SLURM, "MASTER_ADDR": "other"}).master_addr == "other"


def test_srun_that_provides_pmi_is_slurm() -> None:
    assert detect({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "11"}).source == "slurm"


def test_a_launcher_inside_an_allocation_wins() -> None:
    assert detect({**SLURM, **TORCHRUN}).source == "torchrun"
    assert detect({**SLURM, **OPEN_MPI}).source == "mpi"  # SLURM_PROCID is that of mpirun's daemon
    assert detect({**SLURM, **HYDRA}).source == "mpi"


PYTORCH_JOB = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "1",
}
TRAIN_JOB = {
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


def test_a_pod_without_torchrun_is_one_rank() -> None:
    assert _tuple(detect(PYTORCH_JOB)) == (1, 2, 0, 1, "job-master-0", 23456, "kubernetes")
    assert _tuple(detect(TRAIN_JOB)) == (1, 2, 0, 1, "job-node-0-0.job", 29400, "kubernetes")
    alone = {**TRAIN_JOB, "PET_NODE_RANK": "0", "PET_NNODES": "1"}
    assert _tuple(detect(alone)) == (0, 1, 0, 1, "job-node-0-0.job", 0, "kubernetes")


def test_ranks_that_torchrun_or_torch_starts_in_a_pod() -> None:
    assert detect({**TRAIN_JOB, **TORCHRUN}).source == "torchrun"
    spawned = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert _tuple(detect({**TRAIN_JOB, "PET_NPROC_PER_NODE": "4", **spawned}))[:4] == (3, 4, 3, 4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**PYTORCH_JOB, "WORLD_SIZE": "8"}, "WORLD_SIZE=8 and PET_NNODES=2 .*torchrun SCRIPT"),
        ({**TRAIN_JOB, "PET_NPROC_PER_NODE": "4"}, "PET_NPROC_PER_NODE=4, but .*not started by torchrun"),
        ({**PYTORCH_JOB, "RANK": "0"}, "RANK=0 and PET_NODE_RANK=1 contradict"),
        ({**TRAIN_JOB, "PET_NNODES": "1:4"}, "PET_NNODES=1:4 is an elastic range"),
        (_without(TRAIN_JOB, "PET_MASTER_ADDR"), "PET_MASTER_ADDR is missing: the operator sets it"),
        (_without(TRAIN_JOB, "PET_MASTER_PORT"), "PET_MASTER_PORT is missing"),
        (_without(TRAIN_JOB, "PET_NNODES"), "PET_NNODES is missing"),
    ],
)
def test_pods_that_lack_ranks(variables: dict[str, str], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        detect(variables)


ELEVEN = {**TORCHRUN, "RANK": "9", "WORLD_SIZE": "11"}  # the ranks of SLURM
TWO = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # those of OPEN_MPI
PMI_OF_SRUN = {"PMI_RANK": "9", "PMI_SIZE": "11"}


@pytest.mark.parametrize(
    ("variables", "first", "second"),
    [
        # `export RANK=$SLURM_PROCID` in the batch script, before srun
        ({**SLURM, **ELEVEN, "RANK": "0"}, "RANK=0", "SLURM_PROCID=9"),
        ({**OPEN_MPI, **TWO, "RANK": "0"}, "RANK=0", "OMPI_COMM_WORLD_RANK=1"),
        ({**OPEN_MPI, **TORCHRUN, "WORLD_SIZE": "7"}, "WORLD_SIZE=7", "OMPI_COMM_WORLD_SIZE=2"),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "16", **TORCHRUN},
            "WORLD_SIZE=8",
            "OMPI_COMM_WORLD_SIZE=16",
        ),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=2"),
        ({**HYDRA, **TWO}, "RANK=1", "PMI_RANK=0"),
        ({**HYDRA, **TORCHRUN, "WORLD_SIZE": "9"}, "WORLD_SIZE=9", "PMI_SIZE=2"),
        ({**OPEN_MPI, "PMIX_RANK": "0"}, "OMPI_COMM_WORLD_RANK=1", "PMIX_RANK=0"),
        ({**OPEN_MPI, **HYDRA}, "OMPI_COMM_WORLD_RANK=1", "PMI_RANK=0"),
        ({**OPEN_MPI, **HYDRA, "PMI_RANK": "1", "PMI_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=2", "PMI_SIZE=4"),
        ({**SLURM, **PMI_OF_SRUN, "PMI_RANK": "3"}, "SLURM_PROCID=9", "PMI_RANK=3"),
        ({**SLURM, **PMI_OF_SRUN, "PMI_SIZE": "12"}, "SLURM_STEP_NUM_TASKS=11", "PMI_SIZE=12"),
        ({**SLURM, "PMIX_RANK": "8"}, "SLURM_PROCID=9", "PMIX_RANK=8"),
    ],
)
def test_two_launchers_that_contradict_each_other(variables: dict[str, str], first: str, second: str) -> None:
    with pytest.raises(PlacementError, match=rf"{first} and {second} contradict.*[Uu]nset"):
        detect(variables)


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({**SLURM, **ELEVEN}, "torchrun"),
        ({**SLURM, **PMI_OF_SRUN, "PMIX_RANK": "9"}, "slurm"),
        ({**OPEN_MPI, **TWO, "PMIX_RANK": "1"}, "torchrun"),
        ({**OPEN_MPI, **TORCHRUN}, "torchrun"),  # each of the two processes has started four ranks
        # ranks of torchrun or `ds run`, whose parents have other numbers
        ({**SLURM, **ELEVEN, "RANK": "0", "TORCHELASTIC_RUN_ID": "1"}, "torchrun"),
        ({**OPEN_MPI, **TWO, "RANK": "0", "DS_LAUNCHER": "ds run"}, "ds run"),
        # the shell of an allocation, in which somebody sets the variables of torchrun
        ({**_without(SLURM, "SLURM_STEP_NODELIST"), **ELEVEN, "RANK": "0"}, "torchrun"),
        # an interactive step with one task
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "RANK": "0", "WORLD_SIZE": "1"}, "torchrun"),
    ],
)
def test_launchers_inside_of_each_other_are_no_contradiction(variables: dict[str, str], source: str) -> None:
    assert detect(variables).source == source


def test_what_was_detected_is_said() -> None:
    assert str(detect(SLURM)).startswith("rank 9 of 11, local rank 1 of 3 on this machine, rank 0 at gpu07:2")
    assert "by slurm: SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=11, " in str(detect(SLURM))
    assert "OMPI_COMM_WORLD_LOCAL_RANK=1" in str(detect(OPEN_MPI))
    assert str(detect({})) == "a single process (no launcher has set a variable)"
    assert str(detect({"RANK": "0", "WORLD_SIZE": "1"})) == "a single process (WORLD_SIZE=1, RANK=0)"


def test_inside_an_allocation_but_not_started_by_srun() -> None:
    shell = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"}
    assert detect(shell).source == "single"  # the shell of salloc
    batch = {**shell, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(PlacementError, match=r"SLURM_NTASKS=8, but .* not started by srun .*`srun python"):
        detect(batch)
    assert detect({**batch, "SLURM_NTASKS": "1"}).source == "single"


def test_a_launcher_with_torchruns_variables_is_named() -> None:
    started = {**TORCHRUN, "DS_LAUNCHER": "ds run"}
    assert detect(started).source == "ds run"
    assert detect({**started, "TORCHELASTIC_RUN_ID": "1"}).source == "torchrun", "torchrun inside of it"


@pytest.mark.parametrize("name", list(TORCHRUN))
def test_torchrun_incomplete(name: str) -> None:
    with pytest.raises(PlacementError, match=rf"variable {name} is missing: .*`ds run`"):
        detect(_without(TORCHRUN, name))


@pytest.mark.parametrize("name", list(OPEN_MPI)[1:4])
def test_open_mpi_incomplete(name: str) -> None:
    with pytest.raises(PlacementError, match=rf"{name} is missing: start the processes with mpirun"):
        detect(_without(OPEN_MPI, name))


@pytest.mark.parametrize("name", list(HYDRA)[1:])
def test_hydra_incomplete(name: str) -> None:
    with pytest.raises(PlacementError, match=rf"{name} is missing: start the processes with mpiexec"):
        detect(_without(HYDRA, name))


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_NODEID"])
def test_slurm_incomplete(name: str) -> None:
    with pytest.raises(PlacementError, match=rf"{name} is missing: start the processes with srun"):
        detect(_without(SLURM, name))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TORCHRUN, "RANK": "8"}, "torchrun: rank 8 must be less than the number of ranks, 8"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4 on this machine does not fit"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "9"},
            "local rank 1 of 9 on this machine does not fit into 8 ranks",
        ),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one' is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a TCP port"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[07-"}, r"SLURM_STEP_NODELIST='gpu\[07-' cannot be read"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE='four' cannot be read"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID=3, 3 hosts in SLURM_STEP_NODELIST and 3 counts"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[07-08]"}, "2 hosts in SLURM_STEP_NODELIST and 3 counts"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "3"}, "slurm: rank 9 must be less than the number of ranks, 3"),
    ],
)
def test_contradictions(variables: dict[str, str], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        detect(variables)


@pytest.mark.parametrize("given", [{}, {"LOCAL_RANK": "2"}])
def test_ranks_that_torch_multiprocessing_started_are_on_one_machine(given: dict[str, str]) -> None:
    variables = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **given}
    placement = detect(variables)
    assert (placement.local_rank, placement.local_size) == (2, 4)
    with pytest.raises(PlacementError, match="LOCAL_"):
        detect({**variables, "MASTER_ADDR": "10.0.0.7"})


def test_a_launcher_can_detect_without_torch() -> None:
    code = "import sys, ds_comm; ds_comm.detect({}); assert 'torch' not in sys.modules; ds_comm.start"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'stop'"):
        _ = ds_comm.stop
