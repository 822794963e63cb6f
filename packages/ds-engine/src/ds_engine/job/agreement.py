"""Whether all ranks describe the same job: compared once, before anything is divided among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ds_engine.config.support.errors import ConfigError
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
"""Keys that may differ between ranks: they say what a rank reports."""

_SHOWN = 10


def entries(job: Job, model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """What has to be the same on all ranks, as name -> value."""
    told = dict(_flat("", job.settings.model_dump(exclude=set(_OWN_AFFAIR))))
    told |= {
        "ranks": str(job.topology),
        "device": job.device_type,
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "scheduler": repr(None if job.schedule is None else job.schedule.name),
    }
    if job.topology.model.size > 1:  # each rank has parameters of its own
        return told
    told["model"] = f"{type(model).__name__} with {_shape_of(model)}"
    told["number of parameter groups"] = str(len(optimizer.param_groups))
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        told |= _flat(f"optimizer.param_groups[{number}].", options)
        told[f"optimizer.param_groups[{number}]"] = f"{len(group['params'])} parameters"
    return told


def check(job: Job, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    """Compare the job over all ranks of the process group. Collective.

    Raises:
        ConfigError: on every rank, if the ranks differ; with each value and the ranks that have it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    told = entries(job, model, optimizer)
    mine = _digest(told).to(device)
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, mine)
    if all(torch.equal(digests[0], other) for other in digests):
        return
    everyone: list[dict[str, str]] = [{} for _ in digests]
    dist.all_gather_object(everyone, told)
    raise ConfigError([_differences(everyone)])


def _differences(everyone: list[dict[str, str]]) -> str:
    names = dict.fromkeys(name for told in everyone for name in told)
    differing = [name for name in names if len({told.get(name) for told in everyone}) > 1]
    said = []
    for name in differing[:_SHOWN]:
        holders: dict[str, list[int]] = {}
        for rank, told in enumerate(everyone):
            holders.setdefault(told.get(name, "not there"), []).append(rank)
        said.append(f"{name} is " + ", ".join(f"{value} on {_ranks(at)}" for value, at in holders.items()))
    if len(differing) > _SHOWN:
        said.append(f"{len(differing) - _SHOWN} further values differ")
    return (
        f"the ranks describe different jobs: {'; '.join(said)}. Call ds_engine.initialize() with the same "
        "model and settings on every rank"
    )


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"


def _digest(told: Mapping[str, str]) -> torch.Tensor:
    text = "\n".join(f"{name}={value}" for name, value in sorted(told.items()))
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


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
        elif not callable(value):  # a function's address differs in every process
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):  # a capturable optimizer's rate
        return (
            repr(value.item()) if value.numel() == 1 and not value.is_meta else f"a tensor of {value.numel()}"
        )
    return repr(tuple(value) if isinstance(value, list) else value)
