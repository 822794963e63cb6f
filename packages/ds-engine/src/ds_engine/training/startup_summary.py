"""The start-up table of rank 0: settings, their reasons, and the memory of a rank."""

from __future__ import annotations

import io
import math
import shutil
from typing import TYPE_CHECKING

import torch

from ds_engine.config.built import effectless
from ds_engine.config.load import auto
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.zero.optimization import STAGES
from ds_engine.interfaces import HeldBytes, Shares, World
from ds_engine.job.precision import name_of

if TYPE_CHECKING:
    from ds_engine.engine import Engine

Row = tuple[str, str, str]
"""Setting, choice, reason."""


def human(num_bytes: float) -> str:
    """Formats bytes in powers of 1000, for example 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def rows(engine: Engine) -> list[Row]:
    """Returns the rows of the table. Pure, for tests and other front ends."""
    job, config, batch, world = engine.job, engine.config, engine.batch, engine.world
    shares, held = engine.model_state.shares(), engine.model_state.held()
    set_keys = config.model_fields_set
    schedule = engine.lr_scheduler
    table = [
        ("ranks", f"{world.world_size} ({world.backend}, {world.device.type})", _started_by(world)),
        (
            "model",
            f"{shares.params_numel:,} parameters, {shares.trainable_numel:,} trained",
            "computed in " + ", ".join(dtype.removeprefix("torch.") for dtype in shares.compute_dtypes),
        ),
        ("precision", str(engine.precision), _precision_origin(config)),
        ("ZeRO stage", f"{job.stage}: {STAGES[job.stage]}", _origin(config, "zero_optimization")),
        (
            "accumulation",
            f"{batch.steps} micro-batch{'es' * (batch.steps != 1)}, {job.accumulating.plan} plan",
            f"default of stage {job.stage}" if job.accumulating.plan_is_default else "as set",
        ),
        (
            "batch",
            f"{batch.train} = {batch.micro} a rank x {batch.steps} x {batch.ranks} ranks",
            _batch_origin(config),
        ),
        (
            "optimizer",
            _optimizer(engine),
            "passed to initialize()" if job.optimizer is None or job.optimizer.passed else "as set",
        ),
        (
            "schedule",
            type(schedule).__name__ if schedule is not None else "constant rate",
            "default"
            if job.schedule is None
            else "passed to initialize()"
            if job.schedule.passed
            else "as set",
        ),
        (
            "clipping",
            f"norm {job.clipping:g}" if math.isfinite(job.clipping) else "off",
            "as set" if "gradient_clipping" in set_keys else "default; 0 turns it off",
        ),
    ]
    if job.pipeline is not None:
        table.insert(2, ("pipeline", str(job.pipeline), "of the model"))
    return table + _remarks(config) + _memory_rows(engine, shares, held)


def _remarks(config: DsConfig) -> list[Row]:
    """Returns a row with all keys that have no effect, and one with all keys that are still "auto"."""
    idle, autos = effectless(config), auto.defaults(config)
    remarks = []
    if idle:
        names = ", ".join(path.rpartition(".")[2] for path in idle)
        remarks.append(("without effect", names, "done anyway, or not needed: see ds config explain"))
    if autos:
        remarks.append(('"auto"', ", ".join(autos), "not replaced by an integration: default"))
    return remarks


def _started_by(world: World) -> str:
    """Names the launcher, and for schedulers the variables with the rank and the number of ranks."""
    if world.source not in ("slurm", "mpi", "kubernetes"):
        return f"started by {world.source}"
    names = [variable.partition("=")[0] for variable in world.variables]
    return f"started by {world.source} ({', '.join(names[:2])})"


def _origin(config: DsConfig, key: str) -> str:
    return "as set" if key in config.model_fields_set else "default"


def _precision_origin(config: DsConfig) -> str:
    """Names the sections that determine the precision: those that are enabled, and `data_types`."""
    sections = {"fp16": config.fp16.enabled, "bf16": config.bf16.enabled}
    sections |= {"torch_autocast": config.torch_autocast.enabled, "data_types": True}
    keys = [key for key, on in sections.items() if on and key in config.model_fields_set]
    return "as set by " + ", ".join(keys) if keys else "default"


def _batch_origin(config: DsConfig) -> str:
    if config.elasticity.enabled:
        return f"chosen by elasticity, at most {config.elasticity.max_train_batch_size}"
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return "from " + ", ".join(key for key in keys if key in config.model_fields_set)


def _optimizer(engine: Engine) -> str:
    optimizer = engine.optimizer
    place = " in host memory" if engine.job.placement.optimizer_on_host else ""
    inner = getattr(optimizer, "inner", None)
    if isinstance(inner, torch.optim.Optimizer):
        optimizer, place = inner, f"{place}, its states in {type(optimizer).__name__}"
    rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(_full_rates(engine)))
    return f"{type(optimizer).__name__} ({type(optimizer).__module__.split('.')[0]}){place}, lr {rates}"


def _full_rates(engine: Engine) -> list[float]:
    """Returns the configured learning rates; the schedule has already changed those in the groups."""
    return [
        float(g.get("initial_lr", engine.optimizer.defaults.get("lr", g.get("lr", 0.0))))
        for g in engine.optimizer.param_groups
    ]


def _memory_rows(engine: Engine, shares: Shares, held: HeldBytes) -> list[Row]:
    """Memory that exists is measured; memory that the first step will allocate is computed."""
    sums = engine.precision.grad_dtype
    state_dtype = getattr(engine.optimizer, "state_dtype", torch.float32)
    states = getattr(engine.optimizer, "state_names", None)
    masters = "fp32 masters" if held.masters_bytes else "fp32 masters: the parameters themselves"
    table = [
        ("a rank holds", human(held.params_bytes), "parameters in the compute dtype"),
        ("", human(held.masters_bytes), masters),
        ("", human(held.grads_bytes), f"reduced gradients, {name_of(sums)}"),
    ]
    if shares.accumulation == "local":
        table.append(
            (
                "",
                human(sums.itemsize * shares.trainable_numel),
                f"whole gradients during accumulation, {name_of(sums)}",
            )
        )
    if states is None:
        table.append(
            ("", human(held.optimizer_bytes), "optimizer states so far; the first step may allocate more")
        )
    else:
        # Shards are padded to whole cache lines, so a small model may have more padding than elements.
        owned = (
            f"for {min(shares.owned_numel, shares.trainable_numel):,} of {shares.trainable_numel:,} elements"
        )
        if shares.owned_numel > shares.trainable_numel:
            owned += f" and {shares.owned_numel - shares.trainable_numel:,} of padding"
        size = human(state_dtype.itemsize * len(states) * shares.owned_numel)
        table.append(("", size, f"optimizer states {owned}, {name_of(state_dtype)}"))
    return table


def render(engine: Engine) -> str:
    """Returns the table as text, in the width of the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ds-engine", title_justify="left", show_header=True, header_style="bold")
    for heading in ("setting", "choice", "why"):
        table.add_column(heading, overflow="fold")
    for row in rows(engine):
        table.add_row(*row)
    out = io.StringIO()
    Console(
        file=out, width=min(max(shutil.get_terminal_size((110, 24)).columns, 60), 140), highlight=False
    ).print(table)
    return out.getvalue().rstrip("\n")
