"""The training device: waiting for it, and its memory. A CPU's is that of the machine and of this process."""

from __future__ import annotations

import resource

import torch

from ds_engine.launch.machine import available_bytes


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_bytes(device: torch.device, local_size: int) -> int:
    """Memory that a rank can still take: what is free on its accelerator, or its part of what is free on this machine
    (limits of cgroups included), which `local_size` ranks share.
    """
    if device.type == "cpu":
        return available_bytes() // local_size
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def memory_bytes(device: torch.device) -> int:
    """Memory in use: of the device's allocator, or, on a CPU, of the process."""
    if device.type != "cpu":
        return int(torch.accelerator.memory_allocated(device))
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device's allocator, or, on a CPU, of the process."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
