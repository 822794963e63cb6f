"""Pods of Kubeflow's PyTorchJob and TrainJob, in which nobody has started torchrun.

Both operators describe the job to torchrun by variables that begin with PET_. PyTorchJob also sets RANK (the number of
the pod), WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A script that a pod runs with `python` is one rank of its job, if
the job has one rank a pod.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_comm.variables import LOOPBACK, PlacementError, Variables

_NODE_RANK, _NODES, _PER_NODE = "PET_NODE_RANK", "PET_NNODES", "PET_NPROC_PER_NODE"
_REMEDY = "run `torchrun SCRIPT` instead of `python SCRIPT` in the pods: it reads the variables that begin with PET_"


@dataclass(frozen=True, kw_only=True)
class Pod:
    """The only rank of a pod."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


def pod(env: Variables) -> Pod | None:
    """Returns the rank of a process that a pod runs without torchrun; None if this is no such process.

    Raises:
        PlacementError: the pod should have several ranks, or the variables contradict each other.
    """
    if "LOCAL_RANK" in env or "LOCAL_WORLD_SIZE" in env or _NODE_RANK not in env:
        return None
    if "MASTER_ADDR" in env and env.text("MASTER_ADDR", _REMEDY) in LOOPBACK:
        return None  # ranks of one pod, which the script has started by torch.multiprocessing
    if _NODES in env and ":" in env.text(_NODES, _REMEDY):
        raise PlacementError(
            f"{_NODES}={env.text(_NODES, _REMEDY)} is an elastic range, and the number of ranks is not known: {_REMEDY}"
        )
    node, nodes = env.number(_NODE_RANK, _REMEDY), env.number(_NODES, _REMEDY)
    per_node = env.text(_PER_NODE, _REMEDY) if _PER_NODE in env else "1"
    size = env.number("WORLD_SIZE", _REMEDY) if "WORLD_SIZE" in env else nodes
    rank = env.number("RANK", _REMEDY) if "RANK" in env else node
    if size != nodes:
        raise PlacementError(
            f"WORLD_SIZE={size} and {_NODES}={nodes} contradict each other where each pod runs one process: {_REMEDY}"
        )
    if per_node.isdecimal() and int(per_node) != 1:
        raise PlacementError(
            f"{_PER_NODE}={per_node}, but this process was not started by torchrun, so the other ranks of this pod do "
            f"not exist: {_REMEDY}"
        )
    if rank != node:
        raise PlacementError(
            f"RANK={rank} and {_NODE_RANK}={node} contradict each other where each pod runs one process: remove RANK "
            "from the environment of the pods, where the operator sets it"
        )
    return Pod(rank=rank, world_size=size, master_addr=_address(env), master_port=_port(env))


def _address(env: Variables) -> str:
    name = "MASTER_ADDR" if "MASTER_ADDR" in env else "PET_MASTER_ADDR"
    return env.text(name, "the operator sets it; is this pod part of a PyTorchJob or TrainJob?")


def _port(env: Variables) -> int:
    remedy = "the operator sets it; is this pod part of a PyTorchJob or TrainJob?"
    return env.port(lambda: env.number("PET_MASTER_PORT", remedy))
