"""The command `ds`. Imports neither torch nor, before an error or a table is shown, rich."""

from __future__ import annotations

from typing import Annotated

import typer

from ds_engine import __version__
from ds_engine.cli.checkpoint import app as checkpoint_app
from ds_engine.cli.comm import app as comm_app
from ds_engine.cli.config import app as config_app
from ds_engine.cli.nvme import app as nvme_app
from ds_engine.cli.pipe import app as pipe_app
from ds_engine.cli.plan import plan
from ds_engine.cli.report import report
from ds_engine.cli.run import run
from ds_engine.cli.tune import tune
from ds_engine.cli.verify import verify

app = typer.Typer(
    name="ds",
    help="Start training jobs, and check the machine they run on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(comm_app, name="comm")
app.add_typer(nvme_app, name="nvme")
app.add_typer(pipe_app, name="pipe")
app.command("plan")(plan)
app.command("report")(report)
app.command("tune")(tune)
app.command("verify")(verify)
app.add_typer(config_app)


def main() -> None:
    """The console script."""
    app(prog_name="ds")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Start training jobs, and check the machine they run on."""


# Options end at the script's name: everything after it is passed to the script.
app.command(context_settings={"allow_interspersed_args": False})(run)


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Check versions, devices and limits; the exit code is 1 if something will not work."""
    from ds_engine.cli import doctor as checks

    findings = checks.examine()
    checks.show_json(findings) if as_json else checks.show_table(findings)
    raise typer.Exit(1 if any(finding.status == "error" for finding in findings) else 0)
