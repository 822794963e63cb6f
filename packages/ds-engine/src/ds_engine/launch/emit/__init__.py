"""`ds run --emit`: a job as an sbatch script, a Kubernetes manifest, or an entry for Ray Train.

Pure functions from a `Job` to a text, in which every word is quoted for the language of the text.
"""

from collections.abc import Callable, Mapping

from ds_engine.launch.emit.job import Job
from ds_engine.launch.emit.kubernetes import pytorch_job, train_job
from ds_engine.launch.emit.ray import ray_train
from ds_engine.launch.emit.slurm import sbatch

FORMS: Mapping[str, Callable[[Job], str]] = {
    "slurm": sbatch,
    "kubernetes": pytorch_job,
    "trainjob": train_job,
    "ray": ray_train,
}
"""Value of --emit -> function."""

__all__ = ["FORMS", "Job"]
