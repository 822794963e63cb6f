"""`start`: initialises the default process group under any launcher."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ds_comm.device import choose_device, default_backend
from ds_comm.placement import Placement, detect
from ds_comm.variables import PlacementError

REPORT_S = 20.0
"""Seconds after which a rank that still waits for the other ranks logs a warning."""
_log = logging.getLogger("ds_comm")

SETTLE_S = 0.05
"""Seconds that a process with a gloo group sleeps before it exits. Releasing the tensors takes well under a
millisecond.
"""


class StartError(RuntimeError):
    """The ranks could not connect. The message names the rank and the address, and says what to check."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The rank of this process, its device and its backend, as plain values. The process group itself is
    torch.distributed's default group.
    """

    rank: int
    """0 <= rank < world_size."""
    world_size: int
    """Number of ranks of the job."""
    local_rank: int
    """0 <= local_rank < local_size: number of this rank on its machine."""
    local_size: int
    """Number of ranks on this machine."""
    device: torch.device
    """Device of this rank. If it is an accelerator, `start` has made it the current one."""
    backend: str
    """Backend of torch.distributed: "gloo", "nccl", ..."""
    source: str
    """Launcher that set the variables: "torchrun", "slurm", "mpi", "single" (none), or "user" (the process group
    existed already and matches no launcher).
    """
    variables: tuple[str, ...] = field(default=(), compare=False)
    """The environment variables from which the rank was read, as NAME=value."""


def start(
    *, device: torch.device | str | None = None, backend: str | None = None, timeout_s: float = 1800
) -> World:
    """Initialises the default process group if there is none, and describes this rank.

    All ranks must call it. A second call returns the same values. Without a launcher it makes a group of one rank and
    opens no port.

    Args:
        device: device of this rank. None: the accelerator with the number of the local rank, or the CPU if there is
            none.
        backend: None: torch.distributed's for the device, gloo for the CPU, nccl for NVIDIA GPUs.
        timeout_s: limit in seconds for connecting all ranks, and for each collective.

    Raises:
        PlacementError: the environment variables are incomplete or contradict each other.
        StartError: the ranks could not connect.
        ValueError: the device or backend does not exist on this machine.
    """
    if dist.is_initialized():
        world = _existing(device, backend)
        _settle_at_exit(world.world_size, world.backend)
        return world
    placement = detect(os.environ)
    _log.info("%s", placement)
    chosen = choose_device(device, placement)
    backend = backend or default_backend(chosen)
    _check_backend(backend)
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index)
    _initialise(placement, chosen, backend, datetime.timedelta(seconds=timeout_s))
    _settle_at_exit(placement.world_size, backend)
    return World(
        rank=placement.rank,
        world_size=placement.world_size,
        local_rank=placement.local_rank,
        local_size=placement.local_size,
        device=chosen,
        backend=dist.get_backend(),
        source=placement.source,
        variables=placement.variables,
    )


def _settle_at_exit(world_size: int, backend: str) -> None:
    """Gives gloo's threads time to release the tensors of the last collective before the interpreter exits.

    A thread of torch's gloo group drops the tensors of a finished collective shortly after the caller got its
    result, and needs the GIL for that. A script that ends right after a collective (a checkpoint ends with one)
    met "terminate called without an active exception" in a quarter of its runs: the interpreter was already
    finalising, and ends a thread that asks for the GIL by unwinding through a destructor. Exit handlers run before
    that point, and sleeping releases the GIL.
    """
    if world_size > 1 and "gloo" in backend:
        atexit.unregister(_settle)
        atexit.register(_settle)


def _settle() -> None:
    time.sleep(SETTLE_S)


def _check_backend(backend: str) -> None:
    for part in backend.split(","):  # "cpu:gloo,xpu:xccl" gives one per type of device
        name = part.rpartition(":")[2].strip().lower()
        if name not in dist.Backend.backend_list or not dist.is_backend_available(name):
            usable = [b for b in dist.Backend.backend_list if dist.is_backend_available(b)]
            raise ValueError(
                f"backend {name!r} is not in torch {torch.__version__} on this machine; available: "
                f"{', '.join(usable)}. Leave backend out to take the one that fits the device"
            )


def _initialise(
    placement: Placement, device: torch.device, backend: str, timeout: datetime.timedelta
) -> None:
    # Binding the device lets nccl connect at once, instead of guessing the device at the first barrier.
    device_id = device if device.type != "cpu" and backend == default_backend(device) else None
    if placement.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in its __all__
        # a store in this process opens no port, so ports cannot clash
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
        return
    host = f"[{placement.master_addr}]" if ":" in placement.master_addr else placement.master_addr
    report = threading.Timer(REPORT_S, _report_waiting, (placement, timeout))
    report.daemon = True
    report.start()
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{host}:{placement.master_port}",
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timeout,
            device_id=device_id,
        )
    except dist.DistError as error:
        raise StartError(_explain(placement, timeout, str(error))) from error
    finally:
        report.cancel()


def _report_waiting(placement: Placement, timeout: datetime.timedelta) -> None:
    """Warns, long before the timeout, that ranks are missing, and reports whether rank 0 accepts a connection."""
    where = f"{placement.master_addr}:{placement.master_port}"
    try:
        socket.create_connection((placement.master_addr, placement.master_port), timeout=5).close()
        tried = (
            f"{where} answers, so another rank is missing: are all {placement.world_size} processes running?"
        )
    except OSError as error:
        tried = (
            f"a connection to {where} fails ({error}): is rank 0 running, are MASTER_ADDR and MASTER_PORT the same on "
            "every rank, and does a firewall let the port through?"
        )
    _log.warning(
        "rank %d of %d (placed by %s) has waited %.0f s for the other ranks, and waits up to %.0f s: %s",
        placement.rank,
        placement.world_size,
        placement.source,
        REPORT_S,
        timeout.total_seconds(),
        tried,
    )


def _explain(placement: Placement, timeout: datetime.timedelta, error: str) -> str:
    where = f"{placement.master_addr}:{placement.master_port}"
    who = f"rank {placement.rank} of {placement.world_size} (placed by {placement.source})"
    first_line = (error.splitlines() or [""])[0]
    if "EADDRINUSE" in error or "already in use" in error:
        return (
            f"{who} cannot listen on port {placement.master_port}: another program has it. Set MASTER_PORT "
            f"to a free port on every rank, or start with `ds run`, which picks one ({first_line})"
        )
    return (
        f"{who} did not connect to the other ranks at {where} within {timeout.total_seconds():g} s. Are all "
        f"{placement.world_size} processes running, does {placement.master_addr!r} reach the machine of rank "
        f"0 from here, and does a firewall let port {placement.master_port} through? ({first_line})"
    )


def _existing(device: torch.device | str | None, backend: str | None) -> World:
    """Describes a process group that exists already, perhaps without any launcher's variables."""
    running = dist.get_backend()
    if backend is not None and backend != running:
        raise ValueError(
            f"backend {backend!r} was requested, but torch.distributed already runs with {running!r}: call "
            f"torch.distributed.destroy_process_group() first, or leave backend out"
        )
    placement = _placement_of_existing()
    chosen = choose_device(device if device is not None else _device_of(running), placement)
    return World(
        rank=placement.rank,
        world_size=placement.world_size,
        local_rank=placement.local_rank,
        local_size=placement.local_size,
        device=chosen,
        backend=running,
        source=placement.source,
        variables=placement.variables,
    )


def _placement_of_existing() -> Placement:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with contextlib.suppress(PlacementError):  # the group exists, so the variables were not needed
        placement = detect(os.environ)
        if placement.world_size == world_size and placement.rank == rank:
            return placement
    # The ranks then exchange their host names. Either all of them come here or none, because the condition depends
    # only on whether the launcher's variables describe this group.
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    local = [i for i, host in enumerate(hosts) if host == hosts[rank]]
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=local.index(rank),
        local_size=len(local),
        master_addr=hosts[0],
        master_port=0,
        source="user",
    )


def _device_of(backend: str) -> torch.device:
    """The device for an existing group: the current accelerator, or the CPU for a CPU group."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or backend == default_backend(torch.device("cpu")):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
