"""`ds run --emit`: prints a job for a scheduler instead of starting it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ds_engine.launch.remote.prepare import Script

_PANEL = "A job for a scheduler"
EmitOption = Annotated[
    str | None,
    typer.Option(
        "--emit",
        help="Print the job and start nothing: slurm (an sbatch script), kubernetes (a PyTorchJob), trainjob "
        "(a TrainJob) or ray (a program for Ray Train). It takes --nproc, --nnodes, --export and --python.",
        rich_help_panel=_PANEL,
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        help="With --emit: number of GPUs to ask for on each machine; 0 for none. Default: one per process.",
        rich_help_panel=_PANEL,
    ),
]
ImageOption = Annotated[
    str, typer.Option(help="With --emit: the container image, for Kubernetes.", rich_help_panel=_PANEL)
]


@dataclass(frozen=True)
class Emission:
    """The options of `ds run` that a printed job takes."""

    form: str
    nproc: int | None
    nodes: int | None
    gpus: int | None
    image: str
    python: str
    export: Sequence[str]


def show_emitted(script: Script, wanted: Emission, say: Callable[[str], None]) -> int:
    """Prints the job, and returns the exit code."""
    from ds_engine.launch.plan import LaunchError

    try:
        print(text_of(script, wanted), end="")
    except LaunchError as error:
        say(f"cannot print the job: {error}")
        return 2
    return 0


def text_of(script: Script, wanted: Emission) -> str:
    """Returns the job as a text.

    Raises:
        LaunchError: the form is unknown, a number is missing or wrong, or a variable is not set here.
    """
    from ds_engine.launch.emit import FORMS, Job
    from ds_engine.launch.plan import LaunchError

    if wanted.form not in FORMS:
        raise LaunchError(f"--emit {wanted.form}: {', '.join(FORMS)} are possible")
    if wanted.nproc is None:
        raise LaunchError("--nproc is missing: --emit needs the number of processes on each machine")
    unset = [name for name in wanted.export if name not in os.environ]
    if unset:
        raise LaunchError(f"--export {unset[0]}: the variable is not set here")
    on_pods = wanted.form in ("kubernetes", "trainjob") and wanted.python == sys.executable
    module = script.kind == "module"
    job = Job(
        script=script.name,
        arguments=tuple(script.target[1 + module :]),
        module=module,
        nodes=1 if wanted.nodes is None else wanted.nodes,
        ranks_per_node=wanted.nproc,
        gpus_per_node=wanted.nproc if wanted.gpus is None else wanted.gpus,
        environ={name: os.environ[name] for name in wanted.export},
        folder=os.getcwd(),
        python="python" if on_pods else wanted.python,
        image=wanted.image,
    )
    return FORMS[wanted.form](job)
