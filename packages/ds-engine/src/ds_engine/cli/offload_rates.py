"""Measures `offload.rates`: what a rank gets of memory, link and disk while all ranks of its machine work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_core import arena, pinned

if TYPE_CHECKING:
    from ds_core.io.speed import Rate
    from ds_engine.config import DsConfig

DISK_BYTES = 256 << 20
"""Bytes that are written to a disk and read again."""
_ROUNDS = 5


def memory_rates(ranks: int = 1) -> dict[str, int]:
    """Returns the rates of host memory, and of the accelerator if there is one, which each rank has for itself.

    Args:
        ranks: number of ranks of the machine, which share its memory.
    """
    rates = {"host": host_rate() // ranks}
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        rates |= {"device": device_rate(device), "link": link_rate(device)}
    return rates


def disk_rates(rate: Rate, ranks: int = 1) -> dict[str, int]:
    """Returns the rates of a disk that `ranks` ranks share."""
    return {"disk_read": round(rate.read / ranks), "disk_write": round(rate.write / ranks)}


def with_measured_rates(
    settings: DsConfig, ranks: int = 1, num_bytes: int = DISK_BYTES
) -> tuple[DsConfig, dict[str, int]]:
    """Returns the settings with measured `offload.rates`, and these. Rates that are set are not measured.

    Args:
        ranks: number of ranks of the machine.
        num_bytes: size of the file on the disk of `offload.budget.nvme_path`.

    Raises:
        ValueError: there is no `offload.budget`, or no such folder.
        OSError: the disk has no room, or cannot be used.
    """
    budget, given = settings.offload.budget, settings.offload.rates
    if budget is None:
        raise ValueError(
            "--measure-offload: the configuration has no offload.budget, so that no rate is used"
        )
    measured = memory_rates(ranks)
    if budget.nvme_path:
        from ds_core.io.speed import Setting, SpeedTest

        if not Path(budget.nvme_path).is_dir():
            raise ValueError(
                f"--measure-offload: offload.budget.nvme_path is {budget.nvme_path!r}, which is no folder"
            )
        aio = settings.aio
        with SpeedTest(budget.nvme_path, num_bytes) as test:
            setting = Setting(aio.block_size, aio.queue_depth, aio.intra_op_parallelism or 0)
            measured |= disk_rates(test.measure(setting, rounds=2), ranks)
    measured = {name: rate for name, rate in measured.items() if name not in given.model_fields_set}
    rates = type(given)(**{name: getattr(given, name) for name in given.model_fields_set}, **measured)
    offload = settings.offload.model_copy(update={"rates": rates})
    return settings.model_copy(update={"offload": offload}), measured


# --- copies


def host_rate(num_bytes: int = 64 << 20, clock: Callable[[], float] = time.perf_counter) -> int:
    """Measures the bytes per second that a copy in host memory reads and writes; the fastest of five."""
    source, target = arena.zeros(num_bytes // 4), arena.zeros(num_bytes // 4)
    return round(2 * num_bytes / _fastest(source, target, lambda: None, clock))


def device_rate(
    device: torch.device, num_bytes: int = 256 << 20, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Measures the bytes per second that a copy in the memory of an accelerator reads and writes; the fastest of
    five.
    """
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return round(
        2 * num_bytes / _fastest(source, target, lambda: torch.accelerator.synchronize(device), clock)
    )


def link_rate(
    device: torch.device, num_bytes: int = 64 << 20, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Measures the bytes per second of copies between page-locked host memory and an accelerator: those of the slower
    direction; in each the fastest of five.
    """
    on_host = pinned.empty(num_bytes, torch.uint8, pinned.choose(True, device.type)).zero_()
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def wait() -> None:
        torch.accelerator.synchronize(device)

    slower = max(_fastest(on_host, on_device, wait, clock), _fastest(on_device, on_host, wait, clock))
    return round(num_bytes / slower)


def _fastest(source: Tensor, target: Tensor, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        wait()
        begin = clock()
        target.copy_(source, non_blocking=True)
        wait()
        seconds.append(clock() - begin)
    return max(min(seconds), 1e-9)
