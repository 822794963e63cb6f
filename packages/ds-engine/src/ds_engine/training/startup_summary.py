"""The table that rank 0 prints at the start: what was chosen, and why, and what each rank holds."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

import torch

import ds_zero
from ds_engine.build.precision import name_of
from ds_engine.config.built import effectless
from ds_engine.config.load import auto
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.zero.optimization import STAGES

if TYPE_CHECKING:
    from ds_engine.engine import Engine

Row = tuple[str, str, str]
"""Setting, choice, reason."""


def human(num_bytes: float) -> str:
    """12.3 MB, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def rows(engine: Engine) -> list[Row]:
    """What was chosen and why; pure, for tests and for other front ends."""
    config, batch, world = engine.config, engine.batch, engine.world
    made = ds_zero.describe(engine.module)
    held = ds_zero.memory(engine.module, engine.optimizer)
    set_keys = config.model_fields_set
    zero = config.zero_optimization
    schedule = engine.lr_scheduler
    table = [
        ("ranks", f"{world.world_size} ({world.backend}, {world.device.type})", f"started by {world.source}"),
        (
            "model",
            f"{made.params_numel:,} parameters, {made.trainable_numel:,} trained",
            "computed in " + ", ".join(dtype.removeprefix("torch.") for dtype in made.compute_dtypes),
        ),
        ("precision", str(engine.precision), _precision_origin(config)),
        ("ZeRO stage", f"{zero.stage}: {STAGES[zero.stage]}", _origin(config, "zero_optimization")),
        (
            "accumulation",
            f"{batch.steps} micro-batches, {made.accumulation} plan",
            "as set" if zero.accumulation_plan else f"default of stage {zero.stage}",
        ),
        (
            "batch",
            f"{batch.train} = {batch.micro} a rank x {batch.steps} x {batch.ranks} ranks",
            _batch_origin(config),
        ),
        ("optimizer", _optimizer(engine), "as set" if config.optimizer else "passed to initialize()"),
        (
            "schedule",
            type(schedule).__name__ if schedule is not None else "constant rate",
            "as set" if config.scheduler else "default" if schedule is None else "passed to initialize()",
        ),
        (
            "clipping",
            f"norm {config.gradient_clipping:g}" if config.gradient_clipping else "off",
            "as set" if "gradient_clipping" in set_keys else "default; 0 turns it off",
        ),
    ]
    return table + _remarks(config) + _memory_rows(engine, made, held)


def _remarks(config: DsConfig) -> list[Row]:
    """One row for all keys that were set and change nothing, and one for what was left to defaults."""
    idle, autos = effectless(config), auto.defaults(config)
    found = []
    if idle:
        names = ", ".join(path.rpartition(".")[2] for path in idle)
        found.append(("without effect", names, "done anyway, or not needed: ds config explain says why"))
    if autos:
        found.append(('"auto"', ", ".join(autos), "nothing has filled it in: the default"))
    return found


def _origin(config: DsConfig, key: str) -> str:
    return "as set" if key in config.model_fields_set else "default"


def _precision_origin(config: DsConfig) -> str:
    keys = [k for k in ("fp16", "bf16", "torch_autocast", "data_types") if k in config.model_fields_set]
    return "as set by " + ", ".join(keys) if keys else "default"


def _batch_origin(config: DsConfig) -> str:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return "from " + ", ".join(key for key in keys if key in config.model_fields_set)


def _optimizer(engine: Engine) -> str:
    optimizer = engine.optimizer
    place = " in host memory" if engine.config.zero_optimization.offload_optimizer.device == "cpu" else ""
    rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(_full_rates(engine)))
    return f"{type(optimizer).__name__} ({type(optimizer).__module__.split('.')[0]}){place}, lr {rates}"


def _full_rates(engine: Engine) -> list[float]:
    """The rates that were asked for; a schedule has already lowered those in the groups."""
    return [
        float(g.get("initial_lr", engine.optimizer.defaults.get("lr", g.get("lr", 0.0))))
        for g in engine.optimizer.param_groups
    ]


def _memory_rows(engine: Engine, made: ds_zero.Summary, held: ds_zero.MemoryReport) -> list[Row]:
    """Counted where memory is there already, by formula where it comes with the first step."""
    sums = engine.precision.grad_dtype
    state_dtype = getattr(engine.optimizer, "state_dtype", torch.float32)
    states = getattr(engine.optimizer, "state_names", None)
    masters = "fp32 masters" if held.masters_bytes else "fp32 masters: the parameters are their own"
    table = [
        ("a rank holds", human(held.params_bytes), "parameters it computes with"),
        ("", human(held.masters_bytes), masters),
        ("", human(held.grads_bytes), f"reduced gradients, {name_of(sums)}"),
    ]
    if made.accumulation == "local":
        table.append(
            (
                "",
                human(sums.itemsize * made.trainable_numel),
                f"whole gradients while micro-batches are summed, {name_of(sums)}",
            )
        )
    if states is None:
        table.append(
            ("", human(held.optimizer_bytes), "optimizer states so far; more may come with the first step")
        )
    else:
        owned = f"for {made.owned_numel:,} of {made.trainable_numel:,} elements"
        size = human(state_dtype.itemsize * len(states) * made.owned_numel)
        table.append(("", size, f"optimizer states {owned}, {name_of(state_dtype)}"))
    return table


def render(engine: Engine) -> str:
    """The table as text, as wide as the terminal."""
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
