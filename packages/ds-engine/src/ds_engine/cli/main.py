"""The command `ds`. Imports neither torch nor, before an error or a table is shown, rich."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ds_engine import __version__
from ds_engine.cli.checkpoint import app as checkpoint_app
from ds_engine.cli.config import app as config_app
from ds_engine.cli.plan import plan
from ds_engine.cli.verify import verify

app = typer.Typer(
    name="ds",
    help="Start training jobs, and check the machine they run on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("plan")(plan)
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
@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[
        str, typer.Argument(help="Python file to run on every rank (or a module, with --module).")
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed to the script unchanged.")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "-n",
            help="Number of processes. Default: one per accelerator, or 2 on a machine without one.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="A ds_config.json, passed to the script as --config FILE.")
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is the name of a module.")] = False,
    grace_s: Annotated[
        float, typer.Option("--grace", help="Seconds between SIGTERM and SIGKILL when ranks are terminated.")
    ] = 10.0,
    stop_s: Annotated[
        float,
        typer.Option(
            "--stop-grace", help="Seconds that ranks have to save and exit after Ctrl-C or SIGTERM."
        ),
    ] = 30.0,
) -> None:
    """Run a script on all ranks of this machine, and terminate all of them if one fails.

    The exit code is that of the rank that failed first, or 128 + n for signal n.
    """
    from ds_engine.launch.local import launch
    from ds_engine.launch.plan import LaunchError
    from ds_engine.launch.supervise import Patience

    try:
        code = launch(
            script,
            arguments or [],
            nproc=nproc,
            module=module,
            config=config,
            say=_say,
            patience=Patience(grace_s=grace_s, stop_s=stop_s),
        )
    except LaunchError as error:
        _say(f"cannot start: {error}")
        code = 2
    raise typer.Exit(code)


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


def _say(line: str) -> None:
    """Prints a line of the launcher itself, with a prefix that distinguishes it from the ranks' output."""
    red = sys.stderr.isatty() and ("failed first" in line or "cannot start" in line)
    text = f"[ds] {line}".rstrip()
    sys.stderr.write(f"\x1b[1;31m{text}\x1b[0m\n" if red else f"{text}\n")
    sys.stderr.flush()
