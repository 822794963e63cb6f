"""`initialize`: from a model and a configuration to an engine, in one readable order."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

import ds_comm
import ds_zero
from ds_engine import rules, schedules
from ds_engine.build import optimizer as optimizer_section
from ds_engine.build import zero as zero_section
from ds_engine.build.data import Loader
from ds_engine.build.memory_check import warn_if_too_large
from ds_engine.build.model_parallel import DataAxis, data_axis
from ds_engine.build.precision import Precision
from ds_engine.config import Batch, ConfigError, DsConfig
from ds_engine.engine import Engine, Parts
from ds_engine.sampling.build import order_of, sampling_of
from ds_engine.sampling.tokens import TokenBatches
from ds_engine.schedules import LRSchedule
from ds_engine.training.accumulation import Accumulation
from ds_engine.training.monitor import Monitor
from ds_engine.training.pacing import Pacing
from ds_engine.training.progress import Progress, to_stderr
from ds_engine.training.timing import Breakdown

if TYPE_CHECKING:
    from ds_engine.checkpoint import BackgroundSaver

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
) -> tuple[Engine, Optimizer, Loader | None, LRSchedule | None]:
    """Make an engine for `model`. Starts the process group if none stands; every rank calls it alike.

    Args:
        model: an ordinary module; it is sharded in place, so use it through the engine from here on.
        config: path of a `ds_config.json`, or the same as a dict. See docs/guide/configuration.md.
        optimizer: an optimizer over the model's parameters, or a function that makes one; default: the
            config's.
        model_parameters: what the config's optimizer gets: parameters or groups; default: those that require
            a gradient.
        training_data: a data set; each rank gets its share in micro-batches.
        lr_scheduler: a schedule over the optimizer, or a function that makes one; default: the config's,
            else a constant rate.
        collate_fn: makes a micro-batch from a list of samples.
        mpu: an object with Megatron's methods (`get_data_parallel_group`, `get_model_parallel_group`, ...) where the
            model itself is cut among ranks.

    Returns:
        Engine, optimizer, loader (None without `training_data`), schedule (None without one).

    Raises:
        ConfigError: a mistake in the configuration, or settings that do not go together.
    """
    if model is None:
        raise ValueError("initialize() needs a model: pass model=...")
    if config is None:
        raise ConfigError(["there is none: pass config=, the path of a JSON file or a dict"])
    # Before anything is started or moved: what can be refused is refused at once.
    settings = rules.load(config, lambda read: _job(read, optimizer, lr_scheduler))
    pacing = Pacing(settings)
    world = ds_comm.start()
    axis = data_axis(mpu, world, settings)
    batch = settings.batch(axis.size)
    precision = Precision.of(settings, world.device.type)
    _seed(settings.seed, world.rank)
    deferred = any(p.is_meta for p in model.parameters())
    if world.device.type != "cpu" and not deferred:
        model.to(world.device)
    built = make_optimizer(settings, optimizer, model, model_parameters)
    # The schedule reads the rates of the groups, which sharding leaves alone; states come later, so nothing
    # is cut in two.
    given = zero_section.options(settings, batch, precision.zero_options(model), model, world)
    warn_if_too_large(model, built, settings, given["config"], world, axis.size)
    # What ds_zero.deferred_init has put off comes into being here, on the default device.
    with world.device if deferred else contextlib.nullcontext():
        ds_zero.shard(model, built, stage=settings.zero_optimization.stage, **given, **axis.options)
    precision.cast_buffers(model)
    schedule = make_schedule(settings, lr_scheduler, built)
    progress = Progress(settings.steps_per_print or 0, world.rank)
    engine = Engine(
        Parts(
            module=model,
            optimizer=built,
            lr_scheduler=schedule,
            config=settings,
            world=world,
            batch=batch,
            precision=precision,
            scaler=precision.scaler(model),
            accumulation=Accumulation(steps=batch.steps, managed=settings.managed_gradient_accumulation),
            progress=progress,
            monitor=Monitor.of(settings, world.rank),
            breakdown=_breakdown(settings, world, progress),
            pacing=pacing,
            background=_background(settings, progress, built),
            loader=_loader(settings, training_data, batch, world, axis, collate_fn),
            axis=axis,
        )
    )
    if world.rank == 0:
        _announce(engine, settings)
    return engine, built, engine.training_dataloader, schedule


def _background(settings: DsConfig, progress: Progress, optimizer: Optimizer) -> BackgroundSaver | None:
    writer = settings.checkpoint.writer
    if writer is None or not writer.decoupled:
        return None
    from ds_engine.checkpoint import BackgroundSaver

    return BackgroundSaver(progress.write, optimizer)


def _breakdown(settings: DsConfig, world: ds_comm.World, progress: Progress) -> Breakdown:
    wanted = world.rank == 0
    return Breakdown(
        time_on=settings.wall_clock_breakdown and wanted,
        memory_on=settings.memory_breakdown and wanted,
        device=world.device,
        every=progress.every,
        write=progress.write,
    )


def _announce(engine: Engine, settings: DsConfig) -> None:
    if settings.dump_state:
        from ds_engine.config.report.explain import explain, table

        to_stderr(table(explain(settings, ranks=engine.world.world_size)))
    if settings.startup_summary:
        from ds_engine.training.startup_summary import render

        to_stderr(render(engine))


def _job(settings: DsConfig, optimizer: object, lr_scheduler: object) -> rules.Job:
    passed: type | None = None
    if isinstance(optimizer, Optimizer):
        passed = type(optimizer)
    elif optimizer is not None:
        passed = optimizer if inspect.isclass(optimizer) else None
    name = passed.__name__ if passed is not None else None if optimizer is None else "function"
    homes = {base.__module__.split(".")[0] for base in passed.__mro__} if passed is not None else set()
    return rules.Job(
        config=settings,
        optimizer=name,
        host_optimizer="ds_offload" in homes,
        scheduler_passed=lr_scheduler is not None,
    )


def _seed(seed: int | None, rank: int) -> None:
    """Different on every rank, or all ranks would drop out the same units. Rank 0's parameters win in any
    case.
    """
    if seed is not None:
        random.seed(seed + rank)
        torch.manual_seed(seed + rank)


def make_optimizer(
    settings: DsConfig,
    given: Optimizer | Callable[[Parameters], Optimizer] | None,
    model: nn.Module,
    model_parameters: Parameters | None,
) -> Optimizer:
    """The optimizer of a job: the given one, or the configuration's over `model`.

    Raises:
        ConfigError: there is none.
    """
    parameters = (
        list(model_parameters)
        if model_parameters is not None
        else [p for p in model.parameters() if p.requires_grad]
    )
    if isinstance(given, Optimizer):
        return given
    if given is not None:
        return given(parameters)
    if settings.optimizer is None:
        raise ConfigError(
            [
                'no optimizer: add a section like "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, or '
                "pass optimizer="
            ]
        )
    on_host = settings.zero_optimization.offload_optimizer.device == "cpu"
    return optimizer_section.build(
        settings.optimizer.type,
        settings.optimizer.params,
        parameters,
        on_host=on_host,
        bf16_states=settings.bf16.enabled and settings.bf16.bf16_optimizer_states,
        names={id(p): name for name, p in model.named_parameters()},
    )


def make_schedule(
    settings: DsConfig, given: LRSchedule | Callable[[Optimizer], LRSchedule] | None, optimizer: Optimizer
) -> LRSchedule | None:
    """The learning-rate schedule of a job: the given one, or the configuration's; None for a constant rate.

    Raises:
        ConfigError: a given one that moves the rates of another optimizer.
    """
    if given is None:
        section = settings.scheduler
        return schedules.build(section.type, section.params, optimizer) if section is not None else None
    if hasattr(given, "step") and not inspect.isclass(given):
        schedule: Any = given
        if getattr(schedule, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                [
                    f"lr_scheduler: this {type(schedule).__name__} moves the rates of another optimizer than the "
                    "engine's, so it would have no effect: pass the optimizer it was made with as optimizer=, or a "
                    "function lr_scheduler=lambda optimizer: ..."
                ]
            )
    else:
        made: Any = given
        schedule = made(optimizer)
    return schedule  # type: ignore[no-any-return]


def _loader(
    settings: DsConfig,
    dataset: Dataset[Any] | None,
    batch: Batch,
    world: ds_comm.World,
    axis: DataAxis,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> Loader | None:
    indexed = dataset is not None and not isinstance(dataset, IterableDataset)
    num_samples = None if dataset is None else len(dataset) if indexed else 0  # type: ignore[arg-type]
    order = order_of(settings, batch, axis.rank, num_samples, indexed)
    if dataset is None:
        return None
    if isinstance(order, TokenBatches) and world.rank == 0:
        if settings.data_efficiency.data_sampling.dynamic_batching.verbose:
            to_stderr(order.describe())
    sampling = sampling_of(settings)
    return Loader(
        dataset,
        micro_batch=batch.micro,
        rank=axis.rank,
        ranks=axis.size,
        seed=settings.seed or 0,
        collate_fn=collate_fn,
        pin_memory=world.device.type != "cpu" or (sampling is not None and sampling.pin_memory),
        drop_last=settings.dataloader_drop_last,
        order=order,
        num_workers=sampling.num_workers if sampling is not None else 0,
    )
