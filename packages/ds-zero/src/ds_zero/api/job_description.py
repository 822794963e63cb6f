"""Describes the arguments of `shard` as text, which ranks compare before the first message that depends on them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ds_zero.comm.agreement import require_same
from ds_zero.comm.ranks import Ranks
from ds_zero.config import ZeroConfig
from ds_zero.runtime.optimizer_options import OptimizerOptions
from ds_zero.tensors.storage import is_fake


def require_same_job(
    params: Mapping[str, nn.Parameter],
    optimizer: Optimizer | None,
    stage: int,
    config: ZeroConfig,
    parts: Mapping[str, str],
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Raises ValueError on every rank if ranks have different arguments. Collective.

    Args:
        parts: descriptions of further arguments.
    """
    if any(is_fake(p) for p in params.values()):
        return  # in `plan`, which simulates one rank
    described = {"stage": str(stage)}
    described |= {f"ZeroConfig.{f.name}": _text(getattr(config, f.name)) for f in fields(config)}
    described |= parts
    described["the model's parameters"] = _summary(
        f"{fqn} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for fqn, p in params.items()
    )
    described |= optimizer_description(params, optimizer)
    require_same(
        "ds_zero.shard", described, ranks, device, "Give every rank the same model, optimizer and arguments"
    )


def optimizer_description(params: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> dict[str, str]:
    """Describes type, options and members of an optimizer over `params`."""
    if optimizer is None:
        return {"the optimizer": "None"}
    name_of = {id(p): fqn for fqn, p in params.items()}
    described = {"the optimizer": type(optimizer).__qualname__, **OptimizerOptions(optimizer).described()}
    for index, group in enumerate(optimizer.param_groups):
        members = (name_of.get(id(p), "?") for p in group["params"])
        described[f"the parameters of param_groups[{index}]"] = _summary(members)
    return described


def _text(value: Any) -> str:
    """Describes a value with the same text in every process: functions by name, since their addresses differ."""
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)


def _summary(lines: Any) -> str:
    listed = list(lines)
    return f"{len(listed)} with checksum {zlib.crc32(repr(listed).encode()):08x}"
