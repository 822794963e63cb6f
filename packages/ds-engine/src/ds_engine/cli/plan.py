"""`ds plan`: prints the plan, or the error in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ds_engine.build.memory.pipeline_plan import PipelinePlan
    from ds_engine.build.memory.plan_table import Options, PlanTable
    from ds_engine.build.step_time.planned import PlannedStep
    from ds_engine.config import DsConfig
    from ds_engine.step_time import Rates


Config = Annotated[str, typer.Option("--config", help="A ds_config.json.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A config.json of a Hugging Face model, a folder with one, or package.module:function or "
        "file.py:function that makes the model, or (model, inputs).",
    ),
]
Ranks = Annotated[int, typer.Option("--ranks", "-n", min=1, help="Data-parallel ranks.")]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch", min=1, help="Number of samples of one forward. Default: that of the configuration."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=1,
        help="Number of tokens of a sample, for a Hugging Face model. Default: its longest sequence, at most 2048.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Device memory of one rank: 80GiB, or 80GB or 80G for 80 x 10^9 bytes."),
]
HostBudget = Annotated[
    str | None, typer.Option("--host-budget", help="Host memory of one rank, for example 64GiB.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda. Default: the device of this machine.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Recompute the activations of every block.")
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="Numbers of ranks, for example 1,8,64: print a table of the peak at every stage on each of them, "
        "instead of one plan.",
    ),
]
RatesFile = Annotated[
    str | None,
    typer.Option(
        "--rates",
        help="JSON with the rates of the machines: predict the time of a step, too. With --measure: write it.",
    ),
]
Measure = Annotated[
    int | None,
    typer.Option(
        "--measure",
        min=1,
        help="Measure the rates with the model itself, in this number of processes on this machine, and predict the "
        "time of a step.",
    ),
]
Html = Annotated[
    str | None,
    typer.Option("--html", help="Write the plan, or the table of --compare, as a page with charts, too."),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Optimizer steps of the run: tell how long it takes, and what it costs. Needs rates.",
    ),
]
MeasureOffload = Annotated[
    bool,
    typer.Option(
        "--measure-offload",
        help="Measure the offload.rates that the configuration does not set, on this machine and in the folder of "
        "offload.budget, plan with them, and print them. Takes some seconds, and writes 256 MiB to the disk.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]


def plan(
    config: Config,
    model: Model,
    ranks: Ranks = 1,
    micro_batch: MicroBatch = None,
    tokens: Tokens = None,
    budget: Budget = None,
    host_budget: HostBudget = None,
    device: Device = None,
    checkpointing: Checkpointing = False,
    compare: Compare = None,
    rates: RatesFile = None,
    measure: Measure = None,
    steps: Steps = None,
    html: Html = None,
    measure_offload: MeasureOffload = False,
    as_json: Json = False,
) -> None:
    """Predict memory and messages of each rank, without starting anything. The exit code is 1 if the job does not
    fit.
    """
    from ds_engine.cli.sizes import parse_bytes
    from ds_engine.cli.waiting import waiting
    from ds_engine.config import ConfigError

    with waiting("reading the configuration and the model") as now:
        try:
            counts = _counts(compare)
            bytes_on_device = None if budget is None else parse_bytes(budget)
            bytes_on_host = None if host_budget is None else parse_bytes(host_budget)

            from ds_engine.build.memory import plan_page, plan_table
            from ds_engine.build.memory.model_source import model_factory
            from ds_engine.config import load

            settings, factory = load(config), model_factory(model, tokens=tokens)
            if measure_offload:
                settings = _with_offload_rates(settings, ranks, now)
            options = plan_table.Options(
                micro_batch=micro_batch,
                checkpointing=checkpointing,
                device=_known_device(device),
                budget_bytes=bytes_on_device,
                host_budget_bytes=bytes_on_host,
                steps=steps,
            )
            known = _rates(rates, measure, settings, model, tokens, options, now)
            result: PlannedStep | PlanTable | PipelinePlan
            if counts is not None:
                result = plan_table.compare(settings, factory, counts, options, say=now, rates=known)
            else:
                now(f"planning stage {settings.zero_optimization.stage} on {ranks} ranks")
                result = _planned(settings, factory, ranks, options, known)
            if html is not None:
                plan_page.write_page(result, Path(html))
        except (ConfigError, ValueError, OSError) as error:
            typer.echo(f"ds plan: {error}", err=True)
            raise typer.Exit(2) from None
    if as_json:
        print(result.to_json())
    else:
        _show(result)
    raise typer.Exit(1 if result.fits is False else 0)


def _planned(
    settings: DsConfig, factory: Callable[[], Any], ranks: int, options: Options, rates: Rates | None
) -> PlannedStep | PipelinePlan:
    """Plans a model, or a pipeline, which cannot be made in a process that is not one of its ranks."""
    import sys

    import torch.distributed as dist

    from ds_engine.build.step_time.planned import planned_step

    try:
        return planned_step(settings, factory, ranks, options, rates)
    except ValueError:
        # The factory has made no PipelineModule, or this process cannot be one of its ranks.
        if "ds_pipe.model" not in sys.modules or dist.is_initialized():
            raise
        from ds_engine.build.memory.pipeline_plan import plan_pipeline

        found = plan_pipeline(settings, factory, ranks, options, rates)
        if found is None:
            raise
        return found


def _rates(
    file: str | None,
    processes: int | None,
    settings: DsConfig,
    model: str,
    tokens: int | None,
    options: Options,
    now: Callable[[str], None],
) -> Rates | None:
    """Reads the rates, or measures and writes them; None if neither is asked for."""
    from ds_engine.step_time import read_rates

    if processes is None:
        return None if file is None else read_rates(file)
    from ds_engine.build.step_time.planned import measured_rates

    now(f"measuring the model in {processes} process{'es' * (processes > 1)}")
    measured = measured_rates(settings, model, tokens, processes, options)
    if file is not None:
        Path(file).write_text(measured.to_json() + "\n", encoding="utf-8")
    return measured


def _with_offload_rates(settings: DsConfig, ranks: int, now: Callable[[str], None]) -> DsConfig:
    """Returns the settings with measured `offload.rates`, which are printed."""
    from ds_engine.cli.offload_rates import with_measured_rates

    now("measuring memory and disk")
    changed, rates = with_measured_rates(settings, _ranks_of_machine(ranks))
    typer.echo('measured, for ds_config.json:  "offload": ' + json.dumps({"rates": rates}), err=True)
    return changed


def _ranks_of_machine(ranks: int) -> int:
    """Returns how many of the ranks share this machine: as many as it has accelerators, if it has any."""
    import torch

    return (
        min(ranks, torch.accelerator.device_count() or ranks) if torch.accelerator.is_available() else ranks
    )


def _counts(text: str | None) -> list[int] | None:
    """Returns the numbers of ranks of --compare, if it is given."""
    from ds_engine.cli.sizes import parse_counts

    if text is None:
        return None
    return parse_counts("--compare", text, "ranks separated by commas, for example 1,8,64")


def _known_device(name: str | None) -> str | None:
    """Returns the name if it is a device type of torch.

    Raises:
        ValueError: torch has no such device type.
    """
    import torch

    if name is None:
        return None
    try:
        return torch.device(name).type
    except RuntimeError:
        raise ValueError(
            f"--device {name}: torch has no such device type; write cpu, cuda, xpu or mps"
        ) from None


def _show(result: PlannedStep | PlanTable | PipelinePlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    header, rows = result.rows()
    sections: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [(result.title(), header, rows)]
    sections += [(one.title, one.header, one.rows) for one in result.sections()]
    for title, names, lines in sections:
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(names):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in lines:
            table.add_row(*row)
        console.print(table)
    for line in result.verdict():
        console.print(line, highlight=False)
