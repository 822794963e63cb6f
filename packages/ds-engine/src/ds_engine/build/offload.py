"""Builds the store of a job whose state is not all on the training device."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ds_engine.config import ConfigError
from ds_engine.interfaces import MovedActivations
from ds_engine.job import Job, Placement


def tiers_of(placement: Placement) -> Any:
    """Returns a function that decides where each tensor is stored, for a store and for its plan; None if all are on
    the training device.
    """
    on_disk, on_host = placement.on("nvme"), placement.on("cpu")
    if not on_disk and not on_host:
        return None
    import ds_offload

    return ds_offload.TiersByKind(
        host=on_host, disk=on_disk, ratio=placement.ratio, max_in_cpu=placement.params_in_cpu
    )


def store_of(job: Job) -> Any:
    """Returns a store of ds_offload for the kinds of state in host memory and on disks; None if there are none."""
    on_disk, on_host = job.placement.on("nvme"), job.placement.on("cpu")
    if not on_disk and not on_host:
        return None
    import ds_offload

    tiers = tiers_of(job.placement)
    if not on_disk:
        return ds_offload.HostStore(on_host, tiers=tiers)
    zero = job.settings.zero_optimization
    paths = {
        kind: zero.offload_param.nvme_path if kind == "param" else zero.offload_optimizer.nvme_path
        for kind in sorted(on_disk)
    }
    folders = {k: path for k, path in paths.items() if path}
    return ds_offload.NVMeStore(folders, host=on_host, tiers=tiers, options=io_options(job))


def io_options(job: Job) -> Any:
    """Returns how files on a disk are read and written."""
    import ds_offload

    aio = job.settings.aio
    return ds_offload.NVMeOptions(
        block_bytes=aio.block_size,
        queue_depth=aio.queue_depth,
        num_threads=aio.intra_op_parallelism or 0,
        verify=aio.verify,
    )


def activations_of(job: Job, model: nn.Module) -> MovedActivations | None:
    """Lets activations of `model` be moved, as configured; None if they stay on the device."""
    section = job.settings.activation_offload
    if section.device == "none":
        return None
    import ds_offload

    options = ds_offload.ActivationOptions(
        device=section.device,
        nvme_path=section.nvme_path,
        min_bytes=section.min_bytes,
        budget_bytes=section.budget_bytes,
        prefetch_bytes=section.prefetch_bytes,
        max_host_bytes=section.max_host_bytes,
        nvme=io_options(job),
    )
    offload = ds_offload.ActivationOffload(options)
    try:
        offload.attach(model, section.layers)
    except ValueError as error:
        raise ConfigError([f"activation_offload.{error}"], job.settings.origin.where) from None
    return offload


def paged(job: Job, optimizer: Optimizer, store: Any) -> Optimizer:
    """Returns `optimizer` with its states in `store`, if the job keeps them on a disk. In host memory, it makes them
    itself, and asks `store` which of them belong on the device.
    """
    if store is not None and hasattr(optimizer, "keep_states_in"):
        optimizer.keep_states_in(store)
    if job.placement.optimizer_states != "nvme":
        return optimizer
    import ds_offload

    if isinstance(optimizer, ds_offload.PagedOptimizer):
        return optimizer
    count = job.settings.zero_optimization.offload_optimizer.buffer_count
    return ds_offload.PagedOptimizer(optimizer, store, num_buffers=count)
