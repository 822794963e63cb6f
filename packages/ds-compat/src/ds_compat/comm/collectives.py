"""`deepspeed.comm`: the functions of torch.distributed, and DeepSpeed's few additional ones."""

from __future__ import annotations

import datetime
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import ds_comm
from ds_compat.comm.slices import gather_slices, reduce_slices
from ds_compat.utils.logs import logger
from ds_engine.build.comm import EngineLog
from ds_engine.config.sections.profiling import CommsLoggerConfig

_PROFILING = frozenset({"prof", "log_name", "debug"})
"""Profiling arguments of DeepSpeed's collectives, which are ignored: `comms_logger` decides what is recorded."""


def __getattr__(name: str) -> Any:
    value = getattr(dist, name)
    if inspect.isfunction(value):
        value = _tolerant(name, value)
    globals()[name] = value
    return value


def _tolerant(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(dist, name)(*args, **{k: v for k, v in kwargs.items() if k not in _PROFILING})

    return call


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: datetime.timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Initialises the default process group unless there is one; without a launcher, a group of this process alone."""
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise AssertionError(
            "dist_init_required=False, but torch.distributed is not initialised: initialise it first, or leave "
            "dist_init_required out"
        )
    timeout = timeout or datetime.timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
    if init_method is not None:
        place: dict[str, Any] = {"rank": rank, "world_size": world_size} if rank >= 0 else {}
        backend = dist_backend or dist.get_default_backend_for_device(_kind())
        dist.init_process_group(backend, init_method=init_method, timeout=timeout, **place)
        return
    if "RANK" in os.environ:  # DeepSpeed uses `distributed_port` if the launcher has not set a port
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    wish = os.environ.get("DS_ACCELERATOR") or None
    ds_comm.start(device=wish, backend=dist_backend, timeout_s=timeout.total_seconds())


def _kind() -> str:
    from ds_compat.device import get_accelerator

    return get_accelerator().device_name()


def is_available() -> bool:
    return True


def get_local_rank() -> int:
    """Returns the local rank that the launcher has set; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


get_local_rank_from_launcher = get_local_rank


def get_world_rank_from_launcher() -> int:
    return int(os.environ.get("RANK", "0"))


def get_world_size_from_launcher() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_world_group() -> Any:
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    whole: Any = dist.group.WORLD
    return dist.get_global_rank(group or whole, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return list(dist.get_process_group_ranks(group or dist.group.WORLD))


def new_group(ranks: Any = None, **options: Any) -> Any:
    return dist.new_group(list(ranks) if ranks is not None else None, **options)


def inference_all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
    return dist.all_reduce(tensor, op=op, group=group)


def has_all_gather_into_tensor() -> bool:
    return True


has_reduce_scatter_tensor = has_all_gather_into_tensor


def has_all_reduce_coalesced() -> bool:
    return False


has_coalescing_manager = has_all_reduce_coalesced


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
    debug: Any = None,
) -> Any:
    """Gathers slices of equal size from all ranks, in the order of ranks. Training gathers parameters by it."""
    return gather_slices(output_tensor, input_tensor, group or dist.group.WORLD, async_op)


def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    prof: bool = False,
    debug: Any = None,
) -> Any:
    """Reduces `tensor` over ranks, and gives each rank its slice. Training reduces gradients by it."""
    return reduce_slices(output_tensor, tensor, op, group or dist.group.WORLD, async_op)


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> Any:
    """Creates a torch DeviceMesh over the default group."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(_kind(), mesh_shape, mesh_dim_names=mesh_dim_names)


_log: list[Any] = []
"""The records of the latest engine or `configure`, because DeepSpeed's functions have no engine as an argument."""


def note_log(log: Any) -> None:
    """Makes `log_summary` print these records; None: it keeps those that it has."""
    _log[:] = [log] if log is not None else _log


def configure(deepspeed_config: Any = None, **keys: Any) -> None:
    """Records collectives from now on, if no engine does, with the keys of `comms_logger`."""
    section = CommsLoggerConfig(**{k: v for k, v in keys.items() if v is not None})
    if section.enabled and not _log:
        note_log(EngineLog(section, print if get_world_rank_from_launcher() == 0 else None).start())


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> Any:
    """Rank 0 prints the recorded collectives; without `comms_logger` there are none. All ranks must call it."""
    if not _log:
        logger.warning("nothing is recorded: set comms_logger.enabled")
        return {} if return_dict else None
    summary = _log[0].log_summary(show_straggler)
    return summary.as_dict(show_straggler=show_straggler) if return_dict else None
