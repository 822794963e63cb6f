"""Chooses the collectives of a job: through shared memory on one machine, and quantised ones (ZeRO++)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

import ds_comm
from ds_comm.compress import IntCompressor
from ds_comm.exchange.checked import checked
from ds_comm.exchange.hierarchy import Hierarchy
from ds_comm.exchange.loco import LoCoReduceScatter
from ds_comm.exchange.quantized import QuantizedAllGather, QuantizedReduceScatter
from ds_comm.log import CommsLog, LogOptions, Summary, TorchCalls, summarise, watch_torch
from ds_engine.build.topology import Meshes
from ds_engine.config import ConfigError, DsConfig
from ds_engine.config.sections.profiling import CommsLoggerConfig
from ds_engine.interfaces import KeepsErrors, World
from ds_engine.job import Job
from ds_engine.training.progress import to_stderr


class EngineLog:
    """The records of an engine's collectives, until `close`."""

    def __init__(self, section: CommsLoggerConfig, write: Callable[[str], None] | None) -> None:
        options = LogOptions(
            verbose=section.verbose,
            prof_all=section.prof_all,
            prof_ops=tuple(section.prof_ops),
            debug=section.debug,
        )
        self.log = CommsLog(options, write=write)
        self._write = write
        self._calls: TorchCalls | None = None

    def start(self) -> EngineLog:
        """Records also the calls of torch.distributed's functions from now on. Returns itself."""
        self._calls = watch_torch(self.log)
        return self

    def log_summary(self, show_straggler: bool = False) -> Summary:
        """Returns what was recorded so far; rank 0 prints it. All ranks must call it.

        Args:
            show_straggler: print also the rank that others wait for.
        """
        summary = summarise(self.log)
        if self._write is not None:
            self._write(summary.text(show_straggler=show_straggler))
        return summary

    def reset(self) -> None:
        """Forgets what was recorded on this rank."""
        self.log.reset()

    def close(self) -> None:
        """Records no calls of torch.distributed any more."""
        if self._calls is not None:
            self._calls.close()


def log_of(settings: DsConfig, world: World) -> EngineLog | None:
    """Returns the records that `comms_logger` asks for; None: nothing is recorded."""
    section = settings.comms_logger
    if not section.enabled:
        return None
    return EngineLog(section, to_stderr if world.rank == 0 else None)


def collectives_of(
    job: Job, meshes: Meshes, world: World, given: Any = None, log: EngineLog | None = None
) -> Any:
    """Returns the collectives for `ds_zero.shard`. Collective if gradients are reduced as int4 on several machines.

    Args:
        given: the argument `comm` of `initialize`: used where nothing is quantised.
        log: records them; None: nothing does.
    """
    base = given if given is not None else ds_comm.collectives()
    if log is not None and isinstance(base, ds_comm.Collectives):
        base = replace(base, log=log.log)
    if job.settings.integrity.message_checksums:
        base = replace(base, connect=checked(_checkable(base, world).connect))
    if not job.quantized:
        return base
    hierarchy = _hierarchy(job, meshes, world) if job.quantized_gradients else None
    return _quantized(job, base, _reduces_int4(job, hierarchy, 1))


def errors_of(comm: Any) -> KeepsErrors | None:
    """Returns what keeps a state between the reductions of gradients; None: nothing does."""
    reduce = getattr(comm, "reduce_scatter", None)
    return reduce if isinstance(reduce, QuantizedReduceScatter) else None


def planned_collectives(job: Job) -> ds_comm.Collectives | None:
    """Returns collectives that tell what a rank sends, without process groups; None: what its tensors have. Ranks are
    taken to be on one machine, except with `zero_hpz_partition_size` ranks on each.
    """
    if not job.quantized:
        return None
    return _quantized(job, ds_comm.Collectives(), _reduces_int4(job, None, _local_size(job, 1)))


def _reduces_int4(job: Job, hierarchy: Hierarchy | None, local_size: int) -> QuantizedReduceScatter:
    """Returns the reduce-scatter of `zero_quantized_gradients`, with error feedback if `zeropp_loco_param` is set."""
    loco = job.settings.zero_optimization.zeropp_loco_param
    if loco is None:
        stochastic = IntCompressor(bits=4, rounding="stochastic")
        return QuantizedReduceScatter(stochastic, hierarchy, local_size=local_size)
    return LoCoReduceScatter(
        None, hierarchy, local_size=local_size, err_beta=loco.err_beta, reset_steps=loco.reset_T
    )


def _quantized(job: Job, base: Any, reduce: QuantizedReduceScatter) -> ds_comm.Collectives:
    exact = ds_comm.Collectives(all_gather=base.all_gather, reduce_scatter=base.reduce_scatter)
    # Secondary copies hold what was gathered, and replicas are reduced and gathered in turn: both stay exact.
    axes = {"secondary": exact, "replicate": exact, **base.axes}
    return ds_comm.Collectives(
        all_gather=QuantizedAllGather() if job.quantized_weights else base.all_gather,
        reduce_scatter=reduce if job.quantized_gradients else base.reduce_scatter,
        axes=axes,
        connect=base.connect,
        log=base.log,
        frozen=ds_comm.QuantizedFrozen() if job.quantized_frozen else base.frozen,
    )


def _local_size(job: Job, of_host: int) -> int:
    """Returns the number of ranks on each machine if gradients are exchanged in two hops, otherwise 1."""
    size = job.topology.shards.size
    local = job.settings.zero_optimization.zero_hpz_partition_size
    local = of_host if local <= 1 else local
    return local if 1 < local < size and size % local == 0 else 1


def _hierarchy(job: Job, meshes: Meshes, world: World) -> Hierarchy | None:
    """Returns the ranks on each machine and those with the same place; None: gradients are exchanged in one hop."""
    local = _local_size(job, world.local_size)
    if local == 1:
        return None
    group = meshes.data.get_group("data") if meshes.data is not None else dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return Hierarchy.of(local, group)


def _checkable(comm: Any, world: World) -> ds_comm.Collectives:
    """Returns the collectives if their messages can have checksums.

    Raises:
        ConfigError: they cannot.
    """
    if not isinstance(comm, ds_comm.Collectives):
        problem = f"initialize(comm=...) was given a {type(comm).__name__}: pass ds_comm.collectives()"
    elif world.device.type != "cpu":
        problem = f"the job is on {world.device.type}, where the backend adds on the way, and nobody sees the messages"
    else:
        return comm
    raise ConfigError([f"integrity.message_checksums is true, but {problem}; or set the key to false"])
