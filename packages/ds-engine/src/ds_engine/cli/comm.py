"""`ds comm`: how fast the ranks of a job exchange tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_engine.files import write_whole

if TYPE_CHECKING:
    from ds_comm.bench import Timing
    from ds_comm.links import Links

app = typer.Typer(help="Measure collectives between ranks.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure collectives between ranks."""


@app.command()
def bench(
    ranks: Annotated[
        int,
        typer.Option(
            "--ranks",
            min=2,
            help="Ranks to start on this machine. Not used if a launcher has started this command.",
        ),
    ] = 2,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Sizes of the tensors, separated by commas.")
    ] = "1KiB,64KiB,1MiB,64MiB",
    collectives: Annotated[
        str | None, typer.Option("--collectives", help="Some of the collectives, separated by commas.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements; the median counts.")] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Measure also each link and the compressors, and write them to this file as a section links.",
        ),
    ] = None,
) -> None:
    """Measure the backend's collectives, and those through shared memory where the system permits them.

    On several machines, start it with a launcher: `ds run --hostfile hosts -m ds_engine comm bench`.
    """
    try:
        from ds_comm.bench import COLLECTIVES
        from ds_engine.cli.sizes import parse_bytes

        chosen = collectives.split(",") if collectives else list(COLLECTIVES)
        unknown = [name for name in chosen if name not in COLLECTIVES]
        if unknown:
            raise ValueError(f"there is no collective {unknown[0]!r}; there are {', '.join(COLLECTIVES)}")
        wanted = [parse_bytes(text) for text in sizes.split(",")]
    except ValueError as error:
        typer.echo(f"ds comm bench: {error}", err=True)
        raise typer.Exit(2) from None
    if "WORLD_SIZE" in os.environ:
        measured, links = _measure(wanted, chosen, rounds, out is not None)
        if os.environ.get("RANK", "0") != "0":
            return
    else:
        from ds_engine.launch import notebook

        measured, links = notebook(_measure, ranks, wanted, chosen, rounds, out is not None)[0]
    _show(measured, as_json)
    if out is not None:
        write_whole(out, f"{json.dumps({'links': links}, indent=2)}\n".encode())


def _measure(
    sizes: list[int], collectives: list[str], rounds: int, with_links: bool
) -> tuple[list[Timing], dict[str, Any]]:
    import ds_comm
    from ds_comm.bench import measure
    from ds_comm.links import measure_links

    world = ds_comm.start()
    measured = measure(sizes, collectives, rounds=rounds, device=world.device)
    if not with_links:
        return measured, {}
    return measured, section(measure_links(world.local_size, device=world.device, rounds=rounds))


def section(links: Links) -> dict[str, Any]:
    """Returns the section `links` of a configuration."""
    made: dict[str, Any] = {
        name: {"latency_us": round(1e6 * link.latency_s, 1), "rate": round(link.bytes_per_s)}
        for name in ("within_host", "between_hosts", "shared_memory")
        if (link := getattr(links, name)) is not None
    }
    codecs = {
        name: {"encode": round(codec.encode_bytes_per_s), "decode": round(codec.decode_bytes_per_s)}
        for name, codec in links.codecs.items()
    }
    return {**made, "codecs": codecs}


def _show(timings: list[Timing], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "collective": t.collective,
            "transport": t.transport,
            "bytes": t.num_bytes,
            "ranks": t.ranks,
            "seconds": t.seconds,
            "bytes_per_s": round(t.bytes_per_s),
        }
        for t in timings
    ]
    if as_json:
        print(json.dumps({"measured": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("collective", "size", "transport", "time", "GB/s", "speed-up", box=None, pad_edge=False)
    base: dict[tuple[str, int], float] = {}
    for timing in timings:
        first = base.setdefault((timing.collective, timing.num_bytes), timing.seconds)
        table.add_row(
            timing.collective,
            _size(timing.num_bytes),
            timing.transport,
            _duration(timing.seconds),
            f"{timing.bytes_per_s / 1e9:.3f}",
            f"{first / timing.seconds:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{timings[0].ranks} ranks, fp32. GB/s: bytes that the best algorithm sends from each rank, per second. "
        "Speed-up: over the first transport.",
        soft_wrap=True,
    )


def _size(num_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
