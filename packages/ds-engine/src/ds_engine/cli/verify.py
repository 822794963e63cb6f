"""`ds verify`: prints the report, or the error in one line."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

_PLACED = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables of launchers: if one is set, this process is a rank already."""


Config = Annotated[str, typer.Option("--config", help="A ds_config.json.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="package.module:function or file.py:function that makes the model, or (model, inputs).",
    ),
]
Batches = Annotated[
    str | None,
    typer.Option(
        "--batches",
        help="A function in the same form that returns micro-batches: a list, a data set or a data loader. "
        "Default: generated from the inputs.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss", help="A function from (model, micro-batch) to the loss. Default: the output of the model."
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        "-n",
        min=1,
        help="Number of processes to start. Default: as `ds run`, or the ranks of the launcher.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", "-k", min=1, help="Optimizer steps.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of weights and random numbers.")]
Bitwise = Annotated[
    bool, typer.Option("--bitwise", help="Accept only bitwise equality, no differences by rounding.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")]


def verify(
    config: Config,
    model: Model,
    batches: Batches = None,
    loss: Loss = None,
    ranks: Ranks = None,
    steps: Steps = 3,
    seed: Seed = 0,
    bitwise: Bitwise = False,
    as_json: Json = False,
    out: Annotated[str | None, typer.Option("--out", hidden=True)] = None,
) -> None:
    """Train a few steps with this configuration and in plain PyTorch, and report the first difference.

    The exit code is 0 if they are equal, bitwise or up to rounding; 1 if they differ; 2 if there is no result.
    """
    wanted = {
        "config": config,
        "model": model,
        "batches": batches,
        "loss": loss,
        "steps": steps,
        "seed": seed,
    }
    if ranks == 1 or "RANK" in os.environ or (ranks is None and any(name in os.environ for name in _PLACED)):
        told = _judge(wanted, bitwise, ranks)
    else:
        told = _start(wanted, bitwise, ranks)
    if out is not None:
        _leave(Path(out), told)
    elif "error" in told:
        typer.echo(f"ds verify: {told['error']}", err=True)
    elif told["rank"] == 0:
        typer.echo(told["json"] if as_json else told["text"])
    raise typer.Exit(0 if out is not None and "error" not in told else told["code"])


def _judge(wanted: Mapping[str, Any], bitwise: bool, ranks: int | None) -> dict[str, Any]:
    """Runs the verification on this rank, and returns its result for printing."""
    from ds_engine.build.memory.plan import load_factory
    from ds_engine.build.verify import verify as judge
    from ds_engine.config import ConfigError, load

    try:
        there = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks is not None and ranks != there:
            raise ValueError(f"--ranks {ranks}, but the launcher has started {there}: remove --ranks")
        settings = load(wanted["config"])
        made = load_factory(wanted["batches"]) if wanted["batches"] is not None else None
        loss: Any = load_factory(wanted["loss"]) if wanted["loss"] is not None else None
        report = judge(
            settings,
            load_factory(wanted["model"]),
            None if made is None else made(),
            loss,
            steps=wanted["steps"],
            bitwise=bitwise,
            seed=wanted["seed"],
        )
    except (ConfigError, ValueError, FileNotFoundError) as error:
        return {"error": str(error), "code": 2}
    except Exception as error:  # noqa: BLE001  (the exit code 1 of an exception would say that trainings differ)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error} (see above)", "code": 2}
    rank = int(os.environ.get("RANK", "0"))
    return {"text": str(report), "json": report.to_json(), "code": 0 if report.ok else 1, "rank": rank}


def _start(wanted: Mapping[str, Any], bitwise: bool, ranks: int | None) -> dict[str, Any]:
    """Starts the ranks, and returns their result."""
    from ds_engine.launch.local import launch
    from ds_engine.launch.plan import LaunchError

    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ds-verify-") as folder:
        out = Path(folder) / "found.json"
        arguments = ["verify", "--out", str(out), *(["--bitwise"] if bitwise else [])]
        for name, value in wanted.items():
            arguments += [f"--{name}", str(value)] if value is not None else []
        try:
            code = launch("ds_engine", arguments, nproc=ranks, module=True, say=said.append)
        except LaunchError as error:
            return {"error": str(error), "code": 2}
        if out.is_file():
            result: dict[str, Any] = json.loads(out.read_text())
            return result
    return {"error": "\n".join(["no rank finished", *said]), "code": code if code > 1 else 2}


def _leave(out: Path, told: Mapping[str, Any]) -> None:
    """Writes rank 0's result, or the first error, for the process that started the ranks."""
    if "error" not in told and told["rank"] != 0:
        return
    partial = out.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(told))
    with contextlib.suppress(FileExistsError):
        os.link(partial, out)
