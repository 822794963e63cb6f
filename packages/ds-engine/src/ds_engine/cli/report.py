"""`ds report`: one page of a training job."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    run: Annotated[
        str,
        typer.Argument(
            help="Folder with the curves of one job: <output_path>/<job_name> of csv_monitor, or one with log.jsonl."
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="The page to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Write one HTML page about a job, finished or running: curves, configuration and dates, without a network."""
    try:
        from ds_profiler.report import write_report

        typer.echo(write_report(run, out))
    except ModuleNotFoundError as error:
        typer.echo(f"ds report: needs ds-profiler ({error}): pip install 'ds-engine[profiler]'", err=True)
        raise typer.Exit(2) from None
    except (OSError, ValueError) as error:
        typer.echo(f"ds report: {error}", err=True)
        raise typer.Exit(2) from None
