"""An sbatch script."""

from __future__ import annotations

import shlex

from ds_engine.launch.emit.job import Job


def sbatch(job: Job) -> str:
    """Returns a script for `sbatch`; srun starts every rank, and ds_comm reads the rank from Slurm's variables."""
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environ.items()]
    # Without --kill-on-bad-exit, the other ranks of a failed one wait in a collective until it times out.
    command = shlex.join(["srun", "--kill-on-bad-exit=1", job.python, "-u", *job.target])
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "set -eu",
        *exports,
        f"cd -- {shlex.quote(job.folder)}",
        f"exec {command}",
    ]
    return "\n".join(lines) + "\n"
