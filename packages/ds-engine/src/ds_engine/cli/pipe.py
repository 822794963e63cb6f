"""`ds pipe`: draws pipeline schedules, and chooses one for measured costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds_engine.files import write_whole

if TYPE_CHECKING:
    from ds_pipe import Choice, Costs, Schedule, Simulation

app = typer.Typer(help="Draw pipeline schedules, and choose the best one.", no_args_is_help=True)

Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Number of pipeline ranks.")]
MicroBatches = Annotated[
    int, typer.Option("--micro-batches", min=1, help="Number of micro-batches in one step.")
]
CostsFile = Annotated[
    Path | None,
    typer.Option("--costs", help="JSON file with the costs of the stages (fields of ds_pipe.Costs)."),
]


@app.command()
def draw(
    schedule: Annotated[
        str, typer.Argument(help="Name of a schedule, or a file with one: our text form, or torch's CSV.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The picture: a .html, .svg or .png file.")],
    ranks: Ranks = 4,
    micro_batches: MicroBatches = 8,
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Stages on each rank, for interleaved and inference."),
    ] = None,
    costs: CostsFile = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that follow each other.")] = 1,
) -> None:
    """Simulate a schedule and draw its timeline. The exit code is 2 if the schedule cannot run."""
    with _reported("draw"):
        from ds_pipe import make, simulate
        from ds_pipe.schedule import NAMES

        if schedule in NAMES or not Path(schedule).is_file():
            value = make(schedule, ranks, micro_batches, chunks=chunks)
        else:
            value = _read(Path(schedule))
        given = None if costs is None else _costs(costs).merged(value.num_stages)
        result = simulate(value, given, steps=steps)
        unit = "units" if costs is None else "s"
        write_whole(out, _picture(out.suffix, result, unit))
        for key, text in _facts(result, unit).items():
            print(f"{key}: {text}")


@app.command("choose")
def choose_schedule(
    costs: Annotated[
        Path,
        typer.Option("--costs", help="JSON file with the costs of the stages (fields of ds_pipe.Costs)."),
    ],
    ranks: Ranks = 4,
    micro_batches: MicroBatches = 8,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory of a rank, for example 80GiB. Default: no limit.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Simulate all schedules and name the fastest that fits. The exit code is 1 if none fits."""
    with _reported("choose"):
        from ds_engine.cli.sizes import parse_bytes
        from ds_pipe import choose

        limit = None if memory is None else parse_bytes(memory)
        choice = choose(_costs(costs), ranks, micro_batches, memory_limit_bytes=limit)
    _show(choice, as_json)
    raise typer.Exit(0 if choice.candidates[0].fits else 1)


def _read(path: Path) -> Schedule:
    from ds_pipe import Schedule

    return Schedule.parse(path.read_text(encoding="utf-8"), name=path.stem)


def _costs(path: Path) -> Costs:
    from ds_pipe import Costs

    return Costs.parse(path.read_text(encoding="utf-8"))


def _facts(result: Simulation, unit: str) -> dict[str, str]:
    rows = {
        "schedule": result.schedule.name,
        "ranks, stages, micro-batches": (
            f"{result.schedule.num_ranks}, {result.schedule.num_stages}, {result.schedule.num_microbatches}"
        ),
        "time of a step": f"{result.step_s:.6g} {unit}",
        "bubble": f"{result.bubble:.1%}",
        "activations kept at most, by rank": ", ".join(map(str, result.peak_activations)),
    }
    if any(result.peak_activation_bytes):
        rows["bytes of memory, fullest rank"] = f"{result.peak_bytes}"
    return rows


def _picture(suffix: str, result: Simulation, unit: str) -> bytes:
    from ds_pipe import draw as drawing

    if suffix == ".html":
        title = f"Pipeline schedule {result.schedule.name}"
        return drawing.html(result.spans, title=title, facts=_facts(result, unit), unit=unit).encode()
    if suffix == ".svg":
        return drawing.svg(result.spans, unit=unit).encode()
    if suffix == ".png":
        return drawing.png(result.spans)
    raise ValueError(f"--out has to end in .html, .svg or .png, got {suffix or 'no ending'!r}")


def _show(choice: Choice, as_json: bool) -> None:
    rows = [
        {
            "schedule": c.name,
            "step_s": c.simulation.step_s,
            "bubble": c.simulation.bubble,
            "peak_bytes": c.simulation.peak_bytes,
            "fits": c.fits,
        }
        for c in choice.candidates
    ]
    best = choice.candidates[0].name if choice.candidates[0].fits else None
    if as_json:
        print(json.dumps({"best": best, "candidates": rows, "left_out": list(choice.left_out)}))
        return
    print(f"{'schedule':<14}{'step (s)':>12}{'bubble':>9}{'peak bytes':>16}  fits")
    for row in rows:
        print(
            f"{row['schedule']:<14}{row['step_s']:>12.6g}{row['bubble']:>9.1%}{row['peak_bytes']:>16}  "
            f"{'yes' if row['fits'] else 'no'}"
        )
    for reason in choice.left_out:
        print(f"left out: {reason}")
    print(f"best: {best}" if best else "no schedule fits")


@contextmanager
def _reported(command: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ds_pipe":
            raise
        typer.echo(f"ds pipe {command}: ds-pipe is not installed: pip install ds-engine[pipe]", err=True)
        raise typer.Exit(2) from None
    except (OSError, ValueError) as error:
        typer.echo(f"ds pipe {command}: {error}", err=True)
        raise typer.Exit(2) from None
