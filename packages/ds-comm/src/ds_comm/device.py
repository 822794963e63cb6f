"""The device of a rank, and the torch.distributed backend for it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ds_comm.placement import Placement
from ds_comm.variables import PlacementError


def choose_device(wish: torch.device | str | None, placement: Placement) -> torch.device:
    """Returns the device of this rank: `wish`, else the accelerator with the number of the local rank, else the CPU.

    A `wish` without an index ("xpu" rather than "xpu:1") gets the local rank as its index. Raises PlacementError if
    there are fewer devices than local ranks, and ValueError if this machine does not have the device.
    """
    available = torch.accelerator.current_accelerator(check_available=True)
    if wish is None:
        wish = available if available is not None else torch.device("cpu")
    device = torch.device(wish)
    if device.type == "cpu":
        return torch.device("cpu")
    if available is None or available.type != device.type:
        accelerator = "no accelerator" if available is None else f"an accelerator of type {available.type!r}"
        raise ValueError(
            f"device {str(device)!r} was requested, but torch {torch.__version__} finds {accelerator}: install a "
            f"torch build for it, or request {'cpu' if available is None else available.type!r}"
        )
    return device if device.index is not None else torch.device(device.type, _index(device.type, placement))


def _index(kind: str, placement: Placement) -> int:
    num_devices = torch.accelerator.device_count()
    if num_devices == 1:
        return 0  # Slurm and containers often make only its own device visible to each process
    if placement.local_rank >= num_devices:
        raise PlacementError(
            f"{placement.source}: local rank {placement.local_rank} has no {kind} device of its own, "
            f"{num_devices} are visible: start at most {num_devices} processes on this machine, or check the "
            f"variable that hides devices (*_VISIBLE_DEVICES)"
        )
    return placement.local_rank


def default_backend(device: torch.device) -> str:
    """Returns the backend that torch.distributed uses for this type of device: gloo for CPU, nccl for NVIDIA, ..."""
    return str(dist.get_default_backend_for_device(device))
