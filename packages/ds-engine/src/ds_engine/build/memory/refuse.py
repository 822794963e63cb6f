"""Refuses a job whose offloaded state does not fit into host memory or on a disk, before anything is allocated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ds_core import host_limits
from ds_engine.build.memory.predict import predicted
from ds_engine.build.offload import folders_of, tiers_of
from ds_engine.interfaces import World
from ds_engine.job import Job

if TYPE_CHECKING:
    from ds_offload.budget.plan import Placed

_MOST_PER_ELEMENT = 32
"""Upper bound of the bytes per element. A model that fits with it needs no plan."""

_log = logging.getLogger("ds_engine")


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A tensor as the functions that choose tiers see it."""

    key: Any
    numel: int


@dataclass(frozen=True, kw_only=True)
class _Key:
    name: str
    kind: str


def refuse_if_impossible(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    placed: Placed | None = None,
    *,
    memory_limits: Callable[[], Sequence[host_limits.Limit]] = host_limits.memory_limits,
    folder_limit: Callable[[Path], host_limits.Limit] = host_limits.folder_limit,
) -> None:
    """Raises if a limit of this host does not permit what is offloaded to its memory and disks, by all its ranks.

    Args:
        memory_limits, folder_limit: read the limits.

    Raises:
        NotEnoughMemory: names what is needed and available, the limit, the ranks, and remedies.
    """
    folders = folders_of(job, placed)
    if not job.placement.on("cpu") and not folders:
        return
    limits = memory_limits()
    spaces = {path: folder_limit(Path(path)) for path in folders.values() if Path(path).is_dir()}
    most = _MOST_PER_ELEMENT * sum(p.numel() for p in model.parameters()) * world.local_size
    if all(most <= limit.available_bytes for limit in (*limits, *spaces.values())):
        return
    try:
        plan = predicted(job, model, optimizer)
    except ValueError as error:
        _log.debug("the memory cannot be planned: %s", error)
        return
    on_disk: Counter[str] = Counter()
    items: list[Any] = [
        _Item(key=_Key(name=tensor.name, kind=tensor.kind), numel=tensor.compute_bytes)
        for tensor in plan.tensors
    ]
    choose = placed.tiers if placed is not None else tiers_of(job.placement)
    for tensor, tier in zip(plan.tensors, choose(items), strict=True):
        if tier == "disk":
            on_disk[folders[tensor.kind]] += tensor.num_bytes
    rank = host_limits.Rank(number=world.rank, ranks_on_host=world.local_size)
    for path, limit in spaces.items():
        host_limits.require(
            f"state on the disk at {path}",
            on_disk[path],
            [limit],
            rank=rank,
            instead=["keep fewer kinds of state on the disk, or a part of them (ratio, offload.budget)"],
        )
    host = plan.host_bytes
    if (
        world.device.type == "cpu"
    ):  # everything is in host memory, of which the process has the parameters already
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu")
        host = max(0, plan.device_bytes - held)
    host += sum(size for path, size in on_disk.items() if host_limits.in_memory(Path(path)))
    remedies = ["use more ranks or a higher stage, so that each rank owns less"]
    if "state" not in folders:
        remedies.insert(
            0, 'keep state on a disk (offload_optimizer.device "nvme", or nvme_path of offload.budget)'
        )
    host_limits.require("training state in host memory", host, limits, rank=rank, instead=remedies)
