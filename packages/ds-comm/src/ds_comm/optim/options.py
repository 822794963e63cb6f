"""Options that all optimizers with compressed communication share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_comm.compress.interfaces import Compressor
from ds_comm.compress.sign import SignCompressor


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How momentum is compressed and what is kept of its errors."""

    compressor: Compressor = field(default_factory=SignCompressor)
    """Encodes what is sent."""
    residual_dtype: torch.dtype = torch.float32
    """Dtype of the residuals. The worker's residual has as many elements as the compressed parameters, so
    torch.bfloat16 saves 2 bytes per parameter, and rounds each residual to 8 significant bits."""
    variance_floor: float = 0.01
    """When a variance is frozen, elements below this fraction of the mean of their block are raised to it. The sign
    compressor sends values of the block's magnitude for every element; an element with a much smaller variance (a
    row of an embedding that was hardly used) would be moved by many times the learning rate. 0: as in the papers."""
    reduce_dtype: torch.dtype = torch.float32
    """Dtype in which gradients are sent and summed in steps at full precision: torch.bfloat16 halves the bytes of the
    first phase, as DistributedDataParallel's bf16 hook does. What it rounds is not fed back."""
    broadcast_parameters: bool = True
    """Copy the parameters of the group's first rank to the others when they are passed to the optimizer, as
    DistributedDataParallel does."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.variance_floor < 1.0:
            raise ValueError(
                f"CompressionOptions: variance_floor must lie in [0, 1), but is {self.variance_floor}"
            )
        if self.reduce_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"CompressionOptions: reduce_dtype must be torch.float32 or torch.bfloat16, but is {self.reduce_dtype}"
            )


def check_peer_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Checks those arguments of DeepSpeed's optimizers that have no meaning here.

    `cuda_aware` and `comm_backend_name` choose between implementations for one library each, which do not exist here:
    the collectives use the process group's backend.
    """
    allowed = {"eps_inside_sqrt": False, "amsgrad": False}
    ignored = ("cuda_aware", "comm_backend_name", "deepspeed")
    for key, value in arguments.items():
        if key in allowed:
            if value != allowed[key]:
                raise ValueError(
                    f"{name}: {key}={value} is not supported; the method defines no such variant: leave it out"
                )
        elif key not in ignored:
            raise TypeError(f"{name}: unexpected argument {key!r}")
    backend = arguments.get("comm_backend_name")
    if backend not in (None, "nccl", "mpi", "gloo", "hccl", "ccl", "compressed"):
        warnings.warn(
            f"{name}: comm_backend_name={backend!r} has no effect; messages use the process group's backend",
            stacklevel=3,
        )


def adam_defaults(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, bias_correction: bool
) -> dict[str, Any]:
    """Returns the group options that all optimizers here have. Raises ValueError naming one that is out of range."""
    for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not float(value) >= 0.0:
            raise ValueError(f"{key} must not be negative, but is {value}")
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must lie in [0, 1), but are {betas}")
    return {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "bias_correction": bias_correction,
    }
