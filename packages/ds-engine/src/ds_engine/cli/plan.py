"""`ds plan`: the table, or what is wrong in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ds_zero import Plan


def plan(
    config: Annotated[str, typer.Option("--config", help="A ds_config.json.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="package.module:function or file.py:function that makes the model, or (model, inputs).",
        ),
    ],
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Data-parallel ranks.")] = 1,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", help="Samples of one forward. Default: the configuration's."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Memory of one rank's device, like 24GiB.")
    ] = None,
    host_budget: Annotated[
        str | None, typer.Option("--host-budget", help="Host memory of one rank, like 64GiB.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. Default: what this machine has.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute the activations of every block.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Say what each rank will hold and send, before anything is started. The exit code is 1 if it does not fit."""
    from ds_engine.build.plan import load_factory
    from ds_engine.build.plan import plan as make
    from ds_engine.cli.sizes import parse_bytes
    from ds_engine.config import ConfigError, load

    try:
        found = make(
            load(config),
            load_factory(model),
            ranks=ranks,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            device=device,
            budget_bytes=None if budget is None else parse_bytes(budget),
            host_budget_bytes=None if host_budget is None else parse_bytes(host_budget),
        )
    except (ConfigError, ValueError, FileNotFoundError) as error:
        typer.echo(f"ds plan: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        print(found.to_json())
    else:
        _show(found)
    raise typer.Exit(1 if found.fits is False else 0)


def _show(found: Plan) -> None:
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
