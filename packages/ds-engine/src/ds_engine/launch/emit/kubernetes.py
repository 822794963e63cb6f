"""Manifests for Kubeflow: PyTorchJob (Training Operator) and TrainJob (Trainer).

Both operators set variables that begin with PET_, from which torchrun reads the number of machines, its own number and
the address of rank 0. The path of a script is one inside of the image.
"""

from __future__ import annotations

from ds_engine.launch.emit.job import Job
from ds_engine.launch.emit.yaml import Value, lines

_HEAD = "# kubectl apply -f THIS_FILE"
_GPU = "nvidia.com/gpu"


def pytorch_job(job: Job) -> str:
    """Returns a PyTorchJob: one master, which has rank 0, and the other machines as workers."""
    container: dict[str, Value] = {"name": "pytorch", "image": job.image, "command": _command(job)}
    container |= {"env": _environ(job), "resources": _resources(job)}
    container |= {"volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
    # The default of 64 MiB is too small for data loaders and NCCL.
    pod: Value = {"containers": [container], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
    replicas: dict[str, Value] = {}
    for role, number in (("Master", 1), ("Worker", job.nodes - 1)):
        if number:
            replicas[role] = {"replicas": number, "restartPolicy": "OnFailure", "template": {"spec": pod}}
    return _manifest(
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": job.name},
            "spec": {"nprocPerNode": str(job.ranks_per_node), "pytorchReplicaSpecs": replicas},
        }
    )


def train_job(job: Job) -> str:
    """Returns a TrainJob for the runtime `torch-distributed`, which Kubeflow Trainer installs."""
    trainer: dict[str, Value] = {"image": job.image, "command": _command(job)}
    trainer |= {"numNodes": job.nodes, "numProcPerNode": job.ranks_per_node, "env": _environ(job)}
    trainer["resourcesPerNode"] = _resources(job)
    return _manifest(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name},
            "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer},
        }
    )


def _manifest(value: Value) -> str:
    return "\n".join([_HEAD, *lines(value)]) + "\n"


def _command(job: Job) -> list[Value]:
    words = [job.python, "-u", "-m", "torch.distributed.run", *job.target]
    return [_literal(word) for word in words]


def _environ(job: Job) -> list[Value]:
    return [{"name": name, "value": _literal(value)} for name, value in job.environ.items()]


def _resources(job: Job) -> Value:
    return {"limits": {_GPU: job.gpus_per_node}} if job.gpus_per_node else {}


def _literal(text: str) -> str:
    """Escapes a text in which Kubernetes would otherwise replace $(NAME), and $$ by $."""
    return text.replace("$", "$$")
