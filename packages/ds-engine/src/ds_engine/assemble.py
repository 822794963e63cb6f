"""`initialize`: builds an engine from a model and a configuration."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from ds_engine import rules
from ds_engine.build import (
    links,
    memory,
    moe,
    offload,
    pipeline,
    profiler,
    ranks,
    self_reducing,
    stalls,
    zero,
)
from ds_engine.build.comm import EngineLog, collectives_of, errors_of, log_of
from ds_engine.build.data import Loader
from ds_engine.build.layers import tensor
from ds_engine.build.optimizer import optimizer_of
from ds_engine.build.schedule import schedule_of
from ds_engine.build.topology import Meshes, topology_of
from ds_engine.config import ConfigError, DsConfig
from ds_engine.engine import Engine, Parts, Training
from ds_engine.interfaces import KeepsErrors, World
from ds_engine.job import Job, agreement, choices_of, describe
from ds_engine.job.topology import Topology
from ds_engine.sampling.build import order_of, sampling_of
from ds_engine.sampling.tokens import TokenBatches
from ds_engine.schedules import LRSchedule
from ds_engine.training import run_record
from ds_engine.training.monitor import Monitor, csv_folder
from ds_engine.training.pacing import Pacing
from ds_engine.training.progress import Progress, to_stderr
from ds_engine.training.reporting import Reporting
from ds_engine.training.savers import Savers
from ds_engine.training.timing import Breakdown
from ds_engine.training.trial import Trial

Parameters = Iterable[Any]


def initialize(
    model: nn.Module | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig | None = None,
    optimizer: Optimizer | Callable[[Parameters], Optimizer] | None = None,
    model_parameters: Parameters | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRSchedule | Callable[[Optimizer], LRSchedule] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    mpu: Any = None,
    comm: Any = None,
) -> tuple[Engine, Optimizer, Loader | None, LRSchedule | None]:
    """Builds an engine for `model`. Initialises the process group if there is none. All ranks must call it with the
    same arguments.

    Args:
        model: an ordinary module. It is sharded in place; from now on call it through the engine. For a
            `ds_pipe.model.PipelineModule` the engine is a `PipelineEngine`, which has `train_batch`.
        config: path of a `ds_config.json`, or a dict with the same content. See docs/guide/configuration.md.
        optimizer: an optimizer over the model's parameters, or a function that makes one from them. Default: the one
            of the configuration.
        model_parameters: parameters or groups for the configuration's optimizer. Default: all parameters that require
            a gradient.
        training_data: a data set, of which each rank gets its part in micro-batches.
        lr_scheduler: a schedule of the optimizer, or a function that makes one from it. Default: the one of the
            configuration, or a constant rate.
        collate_fn: makes a micro-batch from a list of samples.
        mpu: for model-parallel models, an object with Megatron's methods (`get_data_parallel_group`,
            `get_model_parallel_group`, ...). With a `PipelineModule`, the groups have to be those of its topology.
        comm: the collectives that training uses, as for `ds_zero.shard(comm=...)`. Default:
            `ds_comm.collectives()`.

    Returns:
        Engine, optimizer, data loader (None without `training_data`), schedule (None if there is none).

    Raises:
        ConfigError: a mistake in the configuration, or incompatible settings.
    """
    if model is None:
        raise ValueError("initialize() needs a model: pass model=...")
    if config is None:
        raise ConfigError(["no configuration: pass config=, the path of a JSON file or a dict"])
    stages = pipeline.choice_of(model)
    # Checked before a process group is started or a tensor is moved.
    settings = rules.load(config, lambda read: choices_of(read, optimizer, lr_scheduler, pipeline=stages))
    choices = choices_of(settings, optimizer, lr_scheduler, pipeline=stages)
    pacing = Pacing(settings)
    world = ranks.start()
    piped = pipeline.place(settings, model, world, mpu)
    if piped is None:
        topology, meshes = topology_of(settings, world, mpu, tensor.ranks_of(settings, model))
    else:
        topology, meshes = piped.topology, piped.meshes
    job = describe(choices, topology, world.device.type)
    _seed(settings.seed, topology.seed_offset(world.rank))
    if world.device.type != "cpu" and not any(p.is_meta for p in model.parameters()):
        model.to(world.device)
    meshes = _divided(settings, model, topology, meshes, world, optimizer, piped)
    # Ranks of other model parts have other parameters than this one.
    replicas = meshes.data if mpu is not None or piped is not None else None
    log = log_of(settings, world)
    group = None if replicas is None else replicas.get_group()
    given = _Given(optimizer, model_parameters, comm, group, log)
    built, placed, errors = _sharded(job, model, given, meshes, world)
    schedule = schedule_of(job, lr_scheduler, built)
    reporting = _reporting(job, world, schedule, model)
    roles = zero.roles_of(job, model, built, offload.activations_of(job, model), meshes, errors)
    if piped is not None:
        roles = pipeline.with_state(roles, piped, built)
    roles = replace(roles, comms_log=log and log.start(), stalls=stalls.watch_of(settings, model, world))
    parts = Parts(
        job=job,
        world=world,
        training=Training(module=model, optimizer=built, schedule=schedule),
        roles=roles,
        pacing=pacing,
        reporting=reporting,
        savers=_savers(settings, reporting.progress, built),
        loader=_loader(job, training_data, world, collate_fn),
    )
    engine = Engine(parts) if piped is None else _pipeline_engine(parts, piped)
    if world.rank == 0:
        _announce(engine, settings)
        if placed is not None and settings.startup_summary:
            notes = offload.budget_notes(job, placed)
            to_stderr("\n".join([f"placement within offload.budget:\n{placed}", *notes]))
    return engine, built, engine.training_dataloader, schedule


def _pipeline_engine(parts: Parts, placed: pipeline.Placed) -> Engine:
    from ds_engine.pipeline_engine import PipelineEngine

    runs = pipeline.StagesOfJob(parts.job, placed, parts.world.device, parts.roles.guard.scale)
    return PipelineEngine(parts, runs)


def _divided(
    settings: DsConfig,
    model: nn.Module,
    topology: Topology,
    meshes: Meshes,
    world: World,
    optimizer: Any,
    piped: pipeline.Placed | None,
) -> Meshes:
    """Gives each rank its experts and its parts of layers. Returns the meshes with those of experts. Collective."""
    meshes = moe.connect(model, settings, topology, meshes, world, piped is not None)
    if piped is None:
        tensor.cut(model, settings, meshes.tensor, optimizer)
    else:
        pipeline.cut_stages(piped.module, settings, piped.groups, optimizer)
    moe.cut(model, settings, meshes.tensor)
    return meshes


@dataclass(frozen=True)
class _Given:
    """Arguments of `initialize`, the ranks over which an optimizer may reduce gradients (None: all), and the records of
    collectives.
    """

    optimizer: Optimizer | Callable[[Parameters], Optimizer] | None
    parameters: Parameters | None
    comm: Any
    group: Any
    log: EngineLog | None


def _sharded(
    job: Job, model: nn.Module, given: _Given, meshes: Meshes, world: World
) -> tuple[Optimizer, Any, KeepsErrors | None]:
    """Makes the optimizer, and shards the model with it. Returns the optimizer, what a budget has decided, and what the
    collectives keep between reductions.
    """
    built = optimizer_of(job, given.optimizer, model, given.parameters, given.group)
    placed = memory.placed(job, model, built) if job.placement.by_budget else None
    memory.refuse_if_impossible(job, model, built, world, placed)
    store = offload.store_of(job, placed)
    built = offload.paged(job, built, store, placed)
    self_reducing.check_reduction(job, built)
    links.check_links(job, model, built, world)
    zero.require_same(agreement.entries(job, model, built), world.device)
    memory.warn_if_too_large(job, model, built, world)
    # The schedule reads the learning rates of the groups, which sharding does not change. Optimizer states do not
    # exist yet.
    comm = collectives_of(job, meshes, world, given.comm, given.log)
    zero.shard(job, model, built, meshes, world.device, comm, store)
    job.precision.cast_buffers(model)
    return built, placed, errors_of(comm)


def _reporting(job: Job, world: World, schedule: LRSchedule | None, model: nn.Module) -> Reporting:
    settings = job.settings
    total_steps = getattr(schedule, "total_num_steps", None)
    progress = Progress(
        settings.steps_per_print or 0,
        world.rank,
        total_steps=total_steps if isinstance(total_steps, int) else None,
    )
    breakdown = Breakdown(
        time_on=settings.wall_clock_breakdown and world.rank == 0,
        memory_on=settings.memory_breakdown and world.rank == 0,
        device=world.device,
        every=progress.every,
        write=progress.write,
    )
    return Reporting(
        progress=progress,
        monitor=Monitor.of(settings, world.rank),
        breakdown=breakdown,
        experts=moe.curves(job, model),
        profiler=profiler.flops_of(model, settings.flops_profiler, world, job.batch.micro, progress.write),
        trial=Trial.of(job, world, model),
    )


def _savers(settings: DsConfig, progress: Progress, optimizer: Optimizer) -> Savers:
    writer, memory = settings.checkpoint.writer, settings.checkpoint.memory_copies
    savers = Savers()
    if writer is not None and writer.decoupled:
        from ds_engine.checkpoint import BackgroundSaver

        savers.background = BackgroundSaver(progress.write, optimizer)
    if memory is not None:
        from ds_engine.checkpoint import MemoryCopies

        savers.copies, savers.interval = MemoryCopies(memory.copies), memory.interval
    return savers


def _announce(engine: Engine, settings: DsConfig) -> None:
    if settings.csv_monitor.enabled:
        run_record.write(engine, csv_folder(settings))
    if settings.dump_state:
        from ds_engine.config.report.explain import explain, table

        to_stderr(table(explain(settings, ranks=engine.world.world_size)))
    if settings.startup_summary:
        from ds_engine.training.startup_summary import render

        to_stderr(render(engine))


def _seed(seed: int | None, rank: int) -> None:
    """Seeds every rank differently, so that dropout masks differ. All ranks get rank 0's parameters anyway."""
    if seed is not None:
        random.seed(seed + rank)
        torch.manual_seed(seed + rank)


def _loader(
    job: Job,
    dataset: Dataset[Any] | None,
    world: World,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> Loader | None:
    settings, batch, samples = job.settings, job.batch, job.topology.samples
    indexed = dataset is not None and not isinstance(dataset, IterableDataset)
    num_samples = None if dataset is None else len(dataset) if indexed else 0  # type: ignore[arg-type]
    order = order_of(settings, batch, samples.index, num_samples, indexed)
    if dataset is None:
        return None
    if isinstance(order, TokenBatches) and world.rank == 0:
        if settings.data_efficiency.data_sampling.dynamic_batching.verbose:
            to_stderr(order.describe())
    sampling = sampling_of(settings)
    return Loader(
        dataset,
        micro_batch=batch.micro,
        rank=samples.index,
        ranks=samples.size,
        seed=settings.seed or 0,
        collate_fn=collate_fn,
        pin_memory=world.device.type != "cpu" or (sampling is not None and sampling.pin_memory),
        drop_last=settings.dataloader_drop_last,
        order=order,
        num_workers=sampling.num_workers if sampling is not None else 0,
    )
