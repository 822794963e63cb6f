"""The description of a job on one rank, which `initialize` compares over all ranks before it shards anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ds_engine.job.description import Job

_OWN_AFFAIR = frozenset(
    {
        "startup_summary",
        "steps_per_print",
        "dump_state",
        "log_level",
        "wall_clock_breakdown",
        "memory_breakdown",
        "csv_monitor",
        "tensorboard",
        "wandb",
        "comet",
        "flops_profiler",
        "comms_logger",
        "timers",
    }
)
"""Keys that may differ between ranks, because they only control output."""


def entries(job: Job, model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """Returns the values that must be equal on all ranks, by name."""
    settings = dict(_flat("", job.settings.model_dump(exclude=set(_OWN_AFFAIR))))
    # Ranks of one machine may use different disks.
    values = {name: value for name, value in settings.items() if name.rpartition(".")[2] != "nvme_path"}
    values |= {
        "ranks": str(job.topology),
        "device": job.device_type,
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "scheduler": repr(None if job.schedule is None else job.schedule.name),
        "pipeline": repr(job.pipeline),
    }
    if job.pipeline is not None:  # groups are saved together over the stages
        values["number of parameter groups"] = str(len(optimizer.param_groups))
    if job.topology.model.size > 1:  # model-parallel ranks have different parameters
        return values
    values["number of parameter groups"] = str(len(optimizer.param_groups))
    values["model"] = f"{type(model).__name__} with {_shape_of(model)}"
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        values |= _flat(f"optimizer.param_groups[{number}].", options)
        values[f"optimizer.param_groups[{number}]"] = f"{len(group['params'])} parameters"
    return values


def _shape_of(model: nn.Module) -> str:
    described = hashlib.sha256()
    numel = 0
    for name, param in model.named_parameters():
        described.update(f"{name} {tuple(param.shape)} {param.dtype} {param.requires_grad}\n".encode())
        numel += param.numel()
    return f"{numel:,} parameters (names, shapes and dtypes hash to {described.hexdigest()[:8]})"


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif not callable(value):  # the address in a function's repr differs in every process
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):  # the learning rate of a capturable optimizer
        return (
            repr(value.item()) if value.numel() == 1 and not value.is_meta else f"a tensor of {value.numel()}"
        )
    return repr(tuple(value) if isinstance(value, list) else value)
