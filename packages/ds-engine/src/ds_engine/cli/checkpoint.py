"""`ds checkpoint`: inspect, verify, convert and export checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ds_engine.checkpoint import Checkpoint

app = typer.Typer(
    help="Inspect, verify, convert and export checkpoints, ours or DeepSpeed's.", no_args_is_help=True
)

PathArgument = Annotated[
    Path,
    typer.Argument(help="The directory that was passed to save_checkpoint, or the folder of one checkpoint."),
]
TagOption = Annotated[
    str | None,
    typer.Option(
        "--tag",
        "-t",
        help="Name of the checkpoint. Default: the one that 'latest' names.",
    ),
]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "stored": None}


@app.command()
def inspect(
    path: PathArgument,
    tag: TagOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show the contents of a checkpoint, without reading its tensors."""
    with _opened(path, tag) as checkpoint:
        facts = _facts(checkpoint)
        if as_json:
            print(json.dumps(facts | ({"tensors": _listing(checkpoint)} if tensors else {}), indent=2))
            return
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(show_header=False, box=None)
        for key, value in facts.items():
            if key != "states":
                table.add_row(key, str(value))
        console.print(table)
        states = Table("state", "tensors", "elements", "bytes")
        for name, of_state in facts["states"].items():
            states.add_row(name, *(f"{of_state[k]:,}" for k in ("tensors", "elements", "bytes")))
        console.print(states)
        if tensors:
            listing = Table("name", "state", "dtype", "shape", "coordinates")
            for row in _listing(checkpoint):
                where = ", ".join(
                    f"{axis} {index} of {size}" for axis, (index, size) in row["coordinates"].items()
                )
                listing.add_row(row["name"], row["state"], row["dtype"], str(tuple(row["shape"])), where)
            console.print(listing)


@app.command()
def verify(path: PathArgument, tag: TagOption = None) -> None:
    """Read every byte of a checkpoint and verify the checksums.

    The exit code is 1 if anything is damaged, or if 'latest' names a checkpoint that does not exist.
    """
    from ds_engine.checkpoint import folder

    lost = None if tag is not None or folder.is_complete(path) else folder.lost_latest(path)
    with _opened(path, tag) as checkpoint:
        problems = list(checkpoint.verify())
        if lost is not None:
            problems.append(f"{path}: 'latest' names {lost!r}, which does not exist or is incomplete")
        checked = sum(entry.numel * entry.dtype.itemsize for _, _, entry in checkpoint.manifest.entries())
        for problem in problems:
            print(problem)
        sums = (
            ""
            if checkpoint.manifest.files
            else "; DeepSpeed's files have no checksums, so only parsing was checked"
        )
        print(
            f"{checkpoint.path}: {checkpoint.manifest.num_tensors} tensors, {checked:,} bytes: "
            f"{_counted(len(problems)) if problems else 'no damage found'}{sums}"
        )
    raise typer.Exit(1 if problems else 0)


def _counted(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


@app.command()
def convert(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="Directory for the new checkpoint.")],
    tag: TagOption = None,
    out_tag: Annotated[
        str | None, typer.Option("--out-tag", help="Name of the new checkpoint. Default: the same.")
    ] = None,
) -> None:
    """Copy a checkpoint, for example one of DeepSpeed, into our format, which any number of ranks can load."""
    from ds_engine.checkpoint import consolidate

    with _errors():
        print(consolidate.convert(path, out, tag, out_tag))


@app.command()
def export(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="Directory for the files.")],
    tag: TagOption = None,
    layout: Annotated[str, typer.Option("--format", help="safetensors or pt.")] = "safetensors",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or stored.")] = "fp32",
    max_shard_gb: Annotated[
        float, typer.Option("--max-shard-gb", help="Maximum size of a file, in 10^9 bytes.")
    ] = 5.0,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave frozen parameters out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier export.")
    ] = False,
) -> None:
    """Write the whole model in Hugging Face's layout: one file, or shards with an index."""
    import torch

    from ds_engine.checkpoint import consolidate

    if dtype not in _DTYPES or layout not in ("safetensors", "pt"):
        raise typer.BadParameter(f"--format is safetensors or pt, --dtype one of {', '.join(_DTYPES)}")
    name = _DTYPES[dtype]
    with _errors(), _bar() as progress:
        done = consolidate.export(
            path,
            out,
            tag,
            layout="pt" if layout == "pt" else "safetensors",
            dtype=None if name is None else getattr(torch, name),
            max_shard_bytes=int(max_shard_gb * 1e9),
            exclude_frozen=exclude_frozen,
            overwrite=overwrite,
            progress=progress,
        )
    for file in done.files:
        print(file)
    print(f"{done.num_tensors} tensors, {done.num_bytes:,} bytes")


@contextmanager
def _errors() -> Iterator[None]:
    """Prints errors that a user can fix in one line, without a traceback."""
    from ds_engine.checkpoint import CheckpointError

    try:
        yield
    except (CheckpointError, FileNotFoundError, FileExistsError) as error:
        typer.echo(f"ds checkpoint: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _opened(path: Path, tag: str | None) -> Iterator[Checkpoint]:
    from ds_engine.checkpoint import open_checkpoint

    with _errors(), open_checkpoint(path, tag) as checkpoint:
        yield checkpoint


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True) as progress:
        task = progress.add_task("export")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _listing(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": fqn,
            "state": state,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "coordinates": {axis: list(at) for axis, at in entry.coordinates.items()},
        }
        for fqn, state, entry in checkpoint.manifest.entries()
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    axes: dict[str, int] = {}
    for _, state, entry in checkpoint.manifest.entries():
        tensors[state] += 1
        elements[state] += entry.numel
        sizes[state] += entry.numel * entry.dtype.itemsize
        axes |= {axis: size for axis, (_, size) in entry.coordinates.items()}
    return {
        "path": str(checkpoint.path),
        "tag": manifest.tag,
        "written by": ", ".join(f"{k} {v}" for k, v in manifest.values.get("versions", {}).items()),
        "ranks": manifest.world_size,
        **({"axes along which values differ": axes} if axes else {}),
        **manifest.values.get("counters", {}),
        "optimizer": (manifest.values.get("optimizer") or {}).get("family"),
        "tied": manifest.values.get("tied") or {},
        "states": {
            name: {"tensors": tensors[name], "elements": elements[name], "bytes": sizes[name]}
            for name in tensors
        },
    }
