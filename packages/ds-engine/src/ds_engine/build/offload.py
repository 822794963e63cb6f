"""Builds the store of a job whose state is not all on the training device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ds_engine.config import ConfigError
from ds_engine.interfaces import MovedActivations
from ds_engine.job import Job, Placement
from ds_engine.training.progress import to_stderr

if TYPE_CHECKING:
    from ds_offload.activations.choice import LayerChoice
    from ds_offload.budget.plan import Placed
    from ds_zero.predict.report import StoredTensor


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


def place(job: Job, tensors: Sequence[StoredTensor]) -> Placed:
    """Places the tensors of a rank within the job's budget.

    Raises:
        ConfigError: they do not fit.
    """
    from ds_offload.budget import inputs, plan

    budget, rates = job.settings.offload.budget, job.settings.offload.rates
    assert budget is not None
    sizes: dict[str, dict[str, int]] = {}
    copies: dict[str, int] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.name, {})[tensor.kind] = tensor.num_bytes
        copies[tensor.name] = tensor.compute_bytes
    disk = budget.disk if budget.nvme_path else 0
    zero = job.settings.zero_optimization
    # Only what has fp32 masters is stepped during the backward.
    overlaps = zero.overlaps_step and job.precision.param_dtype is not None
    micro_batches = job.batch.steps if job.accumulating.plan == "sharded" else 1
    try:
        return plan.place(
            [
                inputs.BucketBytes(
                    name=name,
                    kinds=kinds,
                    copy_bytes=copies[name],
                    undo=_second_versions(kinds, copies[name]) if overlaps else {},
                )
                for name, kinds in sizes.items()
            ],
            inputs.Room(device_bytes=budget.device, host_bytes=budget.host, disk_bytes=disk),
            inputs.Rates(**rates.model_dump()),
            inputs.Work(
                micro_batches=micro_batches,
                undo_limit_bytes=zero.offload_optimizer.undo_bytes,
                host_reserve_bytes=_host_bytes_of_activations(job),
            ),
        )
    except plan.BudgetError as error:
        raise ConfigError([f"offload.budget: {error}"], job.settings.origin.where) from None


def _second_versions(kinds: Mapping[str, int], copy_bytes: int) -> dict[str, int]:
    """Returns the bytes that an overlapped step keeps of a bucket besides its own: see `ZeroConfig.overlap_step`."""
    if "master" not in kinds:
        return {}
    return {"param": copy_bytes, **{kind: kinds[kind] for kind in ("master", "state") if kind in kinds}}


def _host_bytes_of_activations(job: Job) -> int:
    """Returns the host memory that moved activations may take; 0 if they have no limit."""
    moved = planned_activations(job)
    return 0 if moved is None else int(moved.host_limit_bytes or 0)


def budget_notes(job: Job, placed: Placed) -> list[str]:
    """Returns what the user should know of a placement by a budget: rates that were assumed, and memory that was not
    counted.
    """
    notes = []
    rates = job.settings.offload.rates
    used = {
        "link": placed.kinds("host") | placed.kinds("disk") if job.device_type != "cpu" else (),
        "host": placed.kinds("host") | placed.kinds("disk"),
        "disk_read": placed.kinds("disk"),
        "disk_write": placed.kinds("disk"),
    }
    assumed = [name for name, kinds in used.items() if kinds and name not in rates.model_fields_set]
    if assumed:
        values = ", ".join(f"{name} {getattr(rates, name) / 1e9:g} GB/s" for name in assumed)
        notes.append(
            f"offload.rates were not measured: {values} are assumed. `ds plan --measure-offload` measures them, and "
            "prints the section for the configuration"
        )
    moved = planned_activations(job)
    if moved is not None and moved.host_limit_bytes is None:
        notes.append(
            "offload.budget does not count the host memory of activations: set activation_offload.max_host_bytes"
        )
    return notes


def store_of(job: Job, placed: Placed | None = None) -> Any:
    """Returns a store of ds_offload for the kinds of state in host memory and on disks; None if there are none.

    Args:
        placed: where a budget places the tensors.
    """
    folders = folders_of(job, placed)
    on_host = job.placement.on("cpu") if placed is None else placed.kinds("host")
    tiers = tiers_of(job.placement) if placed is None else placed.tiers
    if not folders and not on_host:
        return None
    import ds_offload

    if not folders:
        return ds_offload.HostStore(on_host, tiers=tiers, pin=_pins(job))
    return ds_offload.NVMeStore(folders, host=on_host, tiers=tiers, options=io_options(job), pin=_pins(job))


def _pins(job: Job) -> bool:
    """Whether host memory is page-locked on a machine with an accelerator."""
    zero = job.settings.zero_optimization
    section = zero.offload_optimizer if job.placement.masters != "device" else zero.offload_param
    return section.pin_memory


def folders_of(job: Job, placed: Placed | None = None) -> dict[str, str]:
    """Returns the folder of each kind that is on a disk, at least in part."""
    zero, budget = job.settings.zero_optimization, job.settings.offload.budget
    if placed is not None:
        path = budget.nvme_path if budget is not None else None
        return dict.fromkeys(sorted(placed.kinds("disk")), path) if path else {}
    paths = {
        kind: zero.offload_param.nvme_path if kind == "param" else zero.offload_optimizer.nvme_path
        for kind in sorted(job.placement.on("nvme"))
    }
    return {kind: path for kind, path in paths.items() if path}


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
    if not job.settings.moves_activations:
        return None
    import ds_offload

    offload = ds_offload.ActivationOffload(
        _activation_options(job),
        chosen=_print_choice if job.settings.startup_summary else lambda choice: None,
    )
    try:
        offload.attach(model, section.layers)
    except ValueError as error:
        raise ConfigError([f"activation_offload.{error}"], job.settings.origin.where) from None
    return offload


def planned_activations(job: Job) -> Any:
    """Returns what moves the activations in a plan of the job; None if they stay on the device."""
    section = job.settings.activation_offload
    if not job.settings.moves_activations:
        return None
    import ds_offload

    return ds_offload.PlannedActivationOffload(_activation_options(job), section.layers)


def _print_choice(choice: LayerChoice) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        to_stderr(f"ds: activations within offload.budget: {choice}")


def _activation_options(job: Job) -> Any:
    import ds_offload

    section, budget = job.settings.activation_offload, job.settings.offload.budget
    return ds_offload.ActivationOptions(
        device="nvme" if section.device == "nvme" else "cpu",
        device_bytes=None if budget is None else budget.activations,
        nvme_path=section.nvme_path,
        min_bytes=section.min_bytes,
        budget_bytes=section.budget_bytes,
        prefetch_bytes=section.prefetch_bytes,
        max_host_bytes=section.max_host_bytes,
        nvme=io_options(job),
    )


def paged(job: Job, optimizer: Optimizer, store: Any, placed: Placed | None = None) -> Optimizer:
    """Returns `optimizer` with its states in `store`, if the job keeps them on a disk. In host memory, it makes them
    itself, and asks `store` which of them belong on the device.
    """
    if store is not None and hasattr(optimizer, "keep_states_in"):
        optimizer.keep_states_in(store)
    if "state" not in folders_of(job, placed):
        return optimizer
    import ds_offload

    if isinstance(optimizer, ds_offload.PagedOptimizer):
        return optimizer
    count = job.settings.zero_optimization.offload_optimizer.buffer_count
    return ds_offload.PagedOptimizer(optimizer, store, num_buffers=count)
