"""`deepspeed.launcher.multinode_runner`: the command with which pdsh, MPI or Slurm starts a job on several machines.

A runner makes a command as a list of words and starts nothing. Words of a list reach mpirun and srun without a shell,
and are not quoted. pdsh joins its words, replaces %n, %h and %u in them, and a shell on each machine reads the result:
these are quoted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

PORT = 29500
"""Port of rank 0 unless --master_port names one; torch's own."""
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_BARE = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
_NO_COMMA = re.compile(r"[\w@%+=:./-]*", re.ASCII)

Pool = Mapping[str, int | Sequence[int]]
"""Host -> its slots, or their number."""


class MultiNodeRunner(ABC):
    """Base class. DeepSpeed's users derive runners of their own from it.

    Args:
        args: what `deepspeed.launcher.runner.parse_args` returns.
        world_info_base64: what `encode_world_info` returns.
    """

    def __init__(self, args: Any, world_info_base64: str) -> None:
        self.args = args
        self.validate_args()
        self.user_arguments = self.parse_user_args()
        self.user_script: str = args.user_script
        self.world_info_base64 = world_info_base64
        self.exports: dict[str, str] = {}
        """Variable -> its value as a word of a shell."""
        self._values: dict[str, str] = {}

    @abstractmethod
    def backend_exists(self) -> bool:
        """Whether the program that starts the job is on the PATH of this machine."""

    @abstractmethod
    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> Any:
        """Returns the command, a list of words.

        Args:
            environment: the environment in which the command will run; variables may be added to it.
            active_resources: hosts and slots that take part.
        """

    def add_export(self, key: str, var: str) -> None:
        """Sets an environment variable of every rank.

        Raises:
            ValueError: a shell has no variable of this name.
        """
        name = key.strip()
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name of an environment variable: write letters, digits and underscores"
            )
        self._values[name] = var
        self.exports[name] = var if _BARE.fullmatch(var) else _double_quoted(var)

    def parse_user_args(self) -> list[str]:
        """Returns the arguments of the script as words of this runner's command."""
        return list(self.args.user_args)

    @property
    def name(self) -> str:
        """The value of --launcher."""
        return type(self).__name__

    def validate_args(self) -> None:  # noqa: B027 (not abstract: a runner may accept every option)
        """Raises ValueError for options of the launcher that this runner cannot follow."""


def _double_quoted(value: str) -> str:
    escaped = re.sub(r'([\\"$`])', r"\\\1", value)
    return f'"{escaped}"'


def _for_pdsh(word: str) -> str:
    """Quotes a word for the shell of a machine, and escapes it for pdsh, which replaces %h and its like."""
    return shlex.quote(word).replace("%", "%%")


def num_slots(slots: int | Sequence[int]) -> int:
    """Returns the number of slots of a host."""
    return slots if isinstance(slots, int) else len(slots)


class PDSHRunner(MultiNodeRunner):
    """pdsh starts one launcher on each machine, which starts the ranks there."""

    def backend_exists(self) -> bool:
        return shutil.which("pdsh") is not None

    @property
    def name(self) -> str:
        return "pdsh"

    def parse_user_args(self) -> list[str]:
        return [_for_pdsh(word) for word in self.args.user_args]

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Pool
    ) -> tuple[list[str], list[str], MutableMapping[str, str]]:
        """Returns the command, another one that ends the job on all machines, and the environment of both."""
        args = self.args
        environment["PDSH_RCMD_TYPE"] = "ssh"
        if getattr(args, "ssh_port", None) is not None:
            environment["PDSH_SSH_ARGS_APPEND"] = (
                f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -p {args.ssh_port}".strip()
            )
        pdsh = ["pdsh", "-S", "-f", "1024", "-w", ",".join(active_resources)]
        pdsh += shlex.split(args.launcher_args)
        port = args.master_port or PORT
        world = f"--world_info={self.world_info_base64}"
        where = f"--master_addr={args.master_addr or next(iter(active_resources))}"
        words = [sys.executable, "-u", "-m", "ds_compat.launch.node", world]
        command = [*map(_for_pdsh, words), "--node_rank=%n", _for_pdsh(where), f"--master_port={port}"]
        flags = ("module", "no_python", "no_local_rank")
        command += [f"--{flag}" for flag in flags if getattr(args, flag)]
        logs = getattr(args, "enable_each_rank_log", None)
        if logs is not None:
            command.append(_for_pdsh(f"--enable_each_rank_log={logs}"))
        # pkill must not match its own command line, in which the brackets stand.
        pattern = f"[-]-world_info={re.escape(self.world_info_base64)} .*--master_port={port}"
        end = [*pdsh, f"pkill -TERM -f {_for_pdsh(pattern)}"]
        script = _for_pdsh(self.user_script)
        return [*pdsh, *self._before(), *command, script, *self.user_arguments], end, environment

    def _before(self) -> list[str]:
        """Returns what the shell of a machine does before it starts the launcher there."""
        words = []
        venv = getattr(self.args, "venv_script", None)
        if venv is not None:
            words.append(f"source {_for_pdsh(venv)};")
        words += [f"export {name}={_for_pdsh(value)};" for name, value in self._values.items()]
        return [*words, f"cd {_for_pdsh(os.getcwd())};"]


class SchedulerRunner(MultiNodeRunner):
    """A program that starts every rank itself, without a shell.

    Args:
        resource_pool: hosts and slots of the host file.
    """

    program: ClassVar[str] = "mpirun"
    label: ClassVar[str]
    needs: ClassVar[str] = "mpirun"
    """The programs without which `backend_exists` is false."""

    def __init__(self, args: Any, world_info_base64: str, resource_pool: Pool) -> None:
        super().__init__(args, world_info_base64)
        self.resource_pool = resource_pool

    def backend_exists(self) -> bool:
        return shutil.which(self.program) is not None

    @property
    def name(self) -> str:
        return self.label

    def validate_args(self) -> None:
        """MPI and Slurm have options of their own for what these would do."""
        args = self.args
        refused = [
            f"--{name}" for name in ("bind_cores_to_rank", "bind_core_list") if getattr(args, name, None)
        ]
        refused += self._filters()
        if refused:
            raise ValueError(
                f"--launcher {self.name} cannot follow {' and '.join(refused)}: pass the options of {self.program} for "
                "it in --launcher_args, or leave hosts out of the host file"
            )

    def _filters(self) -> list[str]:
        """Returns the options that choose hosts or slots."""
        named = [f"--{name}" for name in ("include", "exclude") if getattr(self.args, name)]
        return named + [f"--{name}" for name in ("num_nodes", "num_gpus") if getattr(self.args, name) != -1]

    def _script(self) -> list[str]:
        """Returns the command of a rank."""
        args = self.args
        if args.no_python:
            return [self.user_script, *self.user_arguments]
        return [
            sys.executable,
            "-u",
            *(["-m"] if args.module else []),
            self.user_script,
            *self.user_arguments,
        ]

    def _num_ranks(self) -> int:
        return sum(map(num_slots, self.resource_pool.values()))

    def _per_node(self) -> int:
        """Returns the number of ranks on each machine, which must be the same."""
        numbers = {host: num_slots(slots) for host, slots in self.resource_pool.items()}
        if len(set(numbers.values())) != 1:
            listed = ", ".join(f"{host} {number}" for host, number in numbers.items())
            raise ValueError(
                f"--launcher {self.name} needs the same number of slots on every machine, not {listed}: change the "
                "host file"
            )
        return next(iter(numbers.values()))

    def _meeting(self) -> dict[str, str]:
        """Returns the variables that tell every rank where rank 0 listens."""
        host = self.args.master_addr or next(iter(self.resource_pool))
        return {"MASTER_ADDR": host, "MASTER_PORT": str(self.args.master_port or PORT)}


class OpenMPIRunner(SchedulerRunner):
    """mpirun of Open MPI."""

    label = "openmpi"
    needs = "mpirun and ompi_info of Open MPI"

    def backend_exists(self) -> bool:
        """Open MPI's mpirun and MPICH's have the same name, and one machine may have both."""
        return super().backend_exists() and shutil.which("ompi_info") is not None

    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> list[str]:
        launcher_args = shlex.split(self.args.launcher_args)
        network = ["--mca", "btl", "^openib"]
        if "btl_tcp_if_include" not in launcher_args:
            network += ["--mca", "btl_tcp_if_include", "eth0"]
        variables = {"UCX_TLS": "tcp", **self._meeting(), **self._values}
        exported = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
        ranks = ["mpirun", "-n", str(self._num_ranks())]
        return [*ranks, *self._hosts(), *network, *launcher_args, *exported, *self._script()]

    def _hosts(self) -> list[str]:
        """Open MPI reads the host file itself, where there is one."""
        if Path(self.args.hostfile).is_file():
            return ["-hostfile", self.args.hostfile]
        return ["-host", ",".join(f"{host}:{num_slots(slots)}" for host, slots in self.resource_pool.items())]


class MPICHRunner(SchedulerRunner):
    """mpirun of MPICH, which is Hydra."""

    label = "mpich"
    needs = "mpirun of MPICH"

    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> list[str]:
        launcher_args = shlex.split(self.args.launcher_args)
        per_node = self._per_node()
        variables = {**self._values, **self._meeting(), "LOCAL_SIZE": str(per_node)}
        exported = [word for name, value in variables.items() for word in ("-genv", name, value)]
        ranks = ["mpirun", "-n", str(self._num_ranks()), "-ppn", str(per_node)]
        # Scripts expect RANK and LOCAL_RANK, and Hydra sets only variables of its own.
        helper = [sys.executable, "-u", "-m", "ds_compat.launch.rank_variables"]
        hosts = ["-hosts", ",".join(self.resource_pool)]
        return [*ranks, *launcher_args, *exported, *hosts, *helper, *self._script()]


class IMPIRunner(SchedulerRunner):
    """mpirun of Intel MPI: each rank is a part of the command, with variables of its own."""

    label = "impi"
    needs = "mpirun of Intel MPI"

    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> list[str]:
        launcher_args = shlex.split(self.args.launcher_args)
        per_node, num_ranks = self._per_node(), self._num_ranks()
        variables = {**self._values, **self._meeting(), "WORLD_SIZE": str(num_ranks)}
        variables |= {"LOCAL_SIZE": str(per_node), "LOCAL_WORLD_SIZE": str(per_node), "I_MPI_PIN": "0"}
        command = ["mpirun", "-ppn", str(per_node), *launcher_args]
        command += [word for name, value in variables.items() for word in ("-genv", name, value)]
        command += ["-hosts", ",".join(self.resource_pool)]
        for rank in range(num_ranks):
            own = ["-env", "RANK", str(rank), "-env", "LOCAL_RANK", str(rank % per_node)]
            command += [*([":"] if rank else []), "-n", "1", *own, *self._script()]
        return command


class MVAPICHRunner(SchedulerRunner):
    """mpirun of MVAPICH2, which is Hydra."""

    label = "mvapich"
    needs = "mpirun and mpiname of MVAPICH2"
    _TUNING: ClassVar[Mapping[str, str]] = {
        "MV2_SMP_USE_CMA": "0",  # containers often forbid process_vm_readv
        "MV2_DEBUG_SHOW_BACKTRACE": "1",
        "MV2_SUPPORT_DL": "1",  # tensors come from torch's allocator
        "MV2_ENABLE_AFFINITY": "0",  # threads of a rank may use all cores
        "MV2_INTER_ALLGATHER_TUNING": "5",
        "MV2_CUDA_USE_NAIVE": "0",
    }

    def backend_exists(self) -> bool:
        return super().backend_exists() and shutil.which("mpiname") is not None

    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> list[str]:
        per_node = self._per_node()
        command = ["mpirun", "-np", str(self._num_ranks()), "-ppn", str(per_node)]
        command += ["-hosts", ",".join(self.resource_pool), *shlex.split(self.args.launcher_args)]
        for name, value in {**self._TUNING, **self._meeting(), **self._values}.items():
            command += ["-genv", name, value]
        return [*command, *self._script()]


class SlurmRunner(SchedulerRunner):
    """srun, inside an allocation or with options that ask for one."""

    program = "srun"
    label = "slurm"
    needs = "srun of Slurm"

    def _filters(self) -> list[str]:
        """Slurm can choose machines, but not slots."""
        args = self.args
        return [f"--{name} with slots" for name in ("include", "exclude") if ":" in getattr(args, name)]

    def get_cmd(self, environment: MutableMapping[str, str], active_resources: Pool) -> list[str]:
        args = self.args
        command = ["srun", "-n", str(self._num_ranks()), *shlex.split(args.launcher_args)]
        for option, hosts in (("--nodelist", args.include), ("--exclude", args.exclude)):
            if hosts:
                command.append(f"{option}={hosts.replace('@', ',')}")
        if args.num_nodes > 0:
            command.append(f"--nodes={args.num_nodes}")
        if args.num_gpus > 0:
            command.append(f"--gpus-per-node={args.num_gpus}")
        if args.master_addr:
            environment["MASTER_ADDR"] = args.master_addr
        if args.master_port:
            environment["MASTER_PORT"] = str(args.master_port)
        export = ["ALL"]
        for name, value in self._values.items():
            if _NO_COMMA.fullmatch(value):
                export.append(f"{name}={value}")
            else:
                environment[name] = (
                    value  # srun splits the option at commas, and passes on its own environment
                )
        return [*command, f"--export={','.join(export)}", *self._script()]


SCHEDULERS: Mapping[str, type[SchedulerRunner]] = {
    runner.label: runner for runner in (OpenMPIRunner, MPICHRunner, IMPIRunner, MVAPICHRunner, SlurmRunner)
}
"""Value of --launcher -> runner, for the programs that start every rank themselves."""
