"""Runs a command with torchrun's variables, made from those of MPI or Slurm, for scripts that read RANK or LOCAL_RANK:

mpirun -n 4 python -m ds_compat.launch.rank_variables python -u train.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import ds_comm


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's variables for this process.

    Raises:
        ds_comm.PlacementError: the environment is incomplete or contradicts itself.
    """
    placement = ds_comm.detect(environ)
    return {
        "RANK": str(placement.rank),
        "WORLD_SIZE": str(placement.world_size),
        "LOCAL_RANK": str(placement.local_rank),
        "LOCAL_WORLD_SIZE": str(placement.local_size),
        "LOCAL_SIZE": str(placement.local_size),
        "MASTER_ADDR": placement.master_addr,
        "MASTER_PORT": str(placement.master_port),
    }


def main(command: Sequence[str]) -> None:
    """Replaces this process by the command."""
    try:
        environ = {**os.environ, **variables(os.environ)}
    except ds_comm.PlacementError as error:
        sys.exit(f"[deepspeed] cannot start: {error}")
    os.execvpe(command[0], [*command], environ)


if __name__ == "__main__":
    main(sys.argv[1:])
