"""`ds plan`: the table, or what is wrong in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ds_engine.build.memory.plan_table import PlanTable
    from ds_zero import Plan


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
    typer.Option("--micro-batch", min=1, help="Samples of one forward. Default: the configuration's."),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=1,
        help="Tokens of a sample, for a Hugging Face model. Default: its maximum, 2048 at most.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Memory of one rank's device: 80GiB, or 80GB = 80G for 80 x 10^9 bytes."),
]
HostBudget = Annotated[str | None, typer.Option("--host-budget", help="Host memory of one rank, like 64GiB.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda. Default: what this machine has.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Recompute the activations of every block.")
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="Numbers of ranks, like 1,8,64: a table of the peak at every stage on each of them, instead of one "
        "plan.",
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
    as_json: Json = False,
) -> None:
    """Say what each rank will hold and send, before anything is started. The exit code is 1 if it does not fit."""
    from ds_engine.cli.sizes import parse_bytes
    from ds_engine.cli.waiting import waiting
    from ds_engine.config import ConfigError

    with waiting("reading the configuration and the model") as now:
        try:
            counts = None if compare is None else _counts(compare)
            bytes_on_device = None if budget is None else parse_bytes(budget)
            bytes_on_host = None if host_budget is None else parse_bytes(host_budget)

            from ds_engine.build.memory import plan_table
            from ds_engine.build.memory.model_source import model_factory
            from ds_engine.build.memory.plan import plan as make
            from ds_engine.config import load

            settings, factory = load(config), model_factory(model, tokens=tokens)
            options = plan_table.Options(
                micro_batch=micro_batch,
                checkpointing=checkpointing,
                device=_known_device(device),
                budget_bytes=bytes_on_device,
                host_budget_bytes=bytes_on_host,
            )
            found: Plan | PlanTable
            if counts is not None:
                found = plan_table.compare(settings, factory, counts, options, say=now)
            else:
                now(f"planning stage {settings.zero_optimization.stage} on {ranks} ranks")
                found = make(settings, factory, ranks=ranks, **options.arguments())
        except (ConfigError, ValueError, OSError) as error:
            typer.echo(f"ds plan: {error}", err=True)
            raise typer.Exit(2) from None
    if as_json:
        print(found.to_json())
    else:
        _show(found)
    raise typer.Exit(1 if found.fits is False else 0)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--compare {text}: write numbers of ranks with commas between them, like 1,8,64")
    return counts


def _known_device(name: str | None) -> str | None:
    """The type of a device that torch knows.

    Raises:
        ValueError: it knows none of that name.
    """
    import torch

    if name is None:
        return None
    try:
        return torch.device(name).type
    except RuntimeError:
        raise ValueError(
            f"--device {name}: torch knows no such device; write cpu, cuda, xpu or mps"
        ) from None


def _show(found: Plan | PlanTable) -> None:
    from rich.console import Console
    from rich.table import Table

    header, rows = found.rows()
    table = Table(title=found.title(), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for line in found.verdict():
        console.print(line, highlight=False)
