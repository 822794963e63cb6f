"""A Python program that starts the job with Ray Train."""

from __future__ import annotations

from ds_engine.launch.emit.job import Job

_PROGRAM = '''"""Starts {name} with Ray Train: `python THIS_FILE` on a machine of the Ray cluster."""

import os
import runpy
import sys

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

SCRIPT = {script!a}
ARGUMENTS = {arguments!a}
ENVIRONMENT = {environ!a}
FOLDER = {folder!a}


def train():
    """Runs on every rank; Ray has set RANK and its like, and has initialised torch.distributed."""
    os.chdir(FOLDER)
    os.environ.update(ENVIRONMENT)
    sys.argv = [SCRIPT, *ARGUMENTS]
    {run}


if __name__ == "__main__":
    scaling = ScalingConfig(
        num_workers={num_ranks},
        use_gpu={use_gpu},{resources}
        placement_strategy="PACK",  # fills one machine before it uses the next
    )
    TorchTrainer(train, scaling_config=scaling).fit()
'''
_SCRIPT = """sys.path.insert(0, os.path.dirname(os.path.abspath(SCRIPT)))
    runpy.run_path(SCRIPT, run_name="__main__")"""
_MODULE = """sys.path.insert(0, FOLDER)
    runpy.run_module(SCRIPT, run_name="__main__", alter_sys=True)"""


def ray_train(job: Job) -> str:
    """Returns the program. Ray decides which machine a rank runs on."""
    gpus = job.gpus_per_node / job.ranks_per_node
    number: float = int(gpus) if gpus == int(gpus) else gpus
    resources = f'\n        resources_per_worker={{"GPU": {number!r}}},' if job.gpus_per_node else ""
    return _PROGRAM.format(
        name=job.name,
        script=job.script,
        arguments=list(job.arguments),
        environ=dict(job.environ),
        folder=job.folder,
        run=_MODULE if job.module else _SCRIPT,
        num_ranks=job.nodes * job.ranks_per_node,
        use_gpu=bool(job.gpus_per_node),
        resources=resources,
    )
