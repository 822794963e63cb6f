"""`ds nvme`: how fast a disk reads and writes, and with which settings of the section `aio`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_engine.files import write_whole

if TYPE_CHECKING:
    from ds_core.io.speed import Rate, Setting, SpeedTest

app = typer.Typer(
    help="Measure a disk for offloading, and find the fastest settings for it.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="A folder on the disk: it gets one file, which is removed.")]
Size = Annotated[
    str, typer.Option("--size", help="Size of the file, for example 1GiB. The same amount of memory is used.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]

_BLOCKS = tuple(2**k for k in (18, 20, 22, 23))
_DEPTHS = (4, 8, 16, 32)
_THREADS = (2, 4, 8)


@app.command()
def bench(
    folder: Folder,
    size: Size = "1GiB",
    block_size: Annotated[
        str | None, typer.Option("--block-size", help="Size of a request, for example 1MiB.")
    ] = None,
    queue_depth: Annotated[
        int | None, typer.Option("--queue-depth", min=1, help="Requests in flight.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads that share one read or write.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="A ds_config.json: its section aio instead of the defaults."),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Times that the file is written and read.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Write and read a file with one setting; each figure is the fastest of the rounds."""
    with _reported("bench"):
        from ds_core.io.speed import Setting
        from ds_engine.cli.sizes import parse_bytes
        from ds_engine.cli.waiting import waiting
        from ds_engine.config import load

        aio = load({} if config is None else config).aio
        setting = Setting(
            aio.block_size if block_size is None else parse_bytes(block_size),
            aio.queue_depth if queue_depth is None else queue_depth,
            (aio.intra_op_parallelism or 0) if threads is None else threads,
        )
        with waiting(f"writing and reading {size} in {folder}"), _speed_test(folder, size) as test:
            rates = [test.measure(setting, rounds)]
    _show(rates, rates[0], as_json)


@app.command()
def tune(
    folder: Folder,
    size: Size = "512MiB",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="No further setting is tried after this time.")
    ] = 60.0,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Ranks of this machine, which share its disk and memory.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write the section aio with the best setting, and offload.rates of one rank, to this file.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try sizes of requests, numbers in flight and numbers of threads, and print the best as a section `aio`.

    The best setting is the one that keeps the least memory in flight within 3 % of the fastest. Up to 20 times the
    size is written.
    """
    with _reported("tune"):
        from ds_engine.cli.waiting import waiting

        with waiting(f"measuring {folder}") as say, _speed_test(folder, size) as test:
            rates = sweep(test, seconds, say)
        from ds_core.io.speed import best

        chosen = best(rates)
        from ds_engine.cli.offload_rates import disk_rates, memory_rates

        rates_of_rank = {**disk_rates(chosen, ranks), **memory_rates(ranks)}
        measured = {"aio": section(chosen.setting), "offload": {"rates": rates_of_rank}}
        if out is not None:
            write_whole(out, f"{json.dumps(measured, indent=2)}\n".encode())
    _show(rates, chosen, as_json, measured)


def sweep(
    test: SpeedTest,
    seconds: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Rate]:
    """Measures sizes and depths with one thread, then more threads with the best of these; one setting at least."""
    from ds_core.io.speed import Setting, best

    begin = clock()
    rates: list[Rate] = []

    def measure(settings: Iterable[Setting]) -> None:
        for setting in settings:
            if rates and clock() - begin > seconds:
                return
            rates.append(test.measure(setting))
            say(f"{len(rates)} settings measured; {_words(setting)}: {_rates(rates[-1])}")

    # From the middle outwards: if the time ends early, the likely settings are done.
    measure(
        Setting(b, d, 1) for b in sorted(_BLOCKS, key=lambda b: abs(b - 2**20)) for d in reversed(_DEPTHS)
    )
    base = best(rates).setting
    measure(Setting(base.block_bytes, base.queue_depth, n) for n in _THREADS)
    return rates


def section(setting: Setting) -> dict[str, Any]:
    """The section `aio` of a configuration for this setting."""
    return {
        "block_size": setting.block_bytes,
        "queue_depth": setting.queue_depth,
        "intra_op_parallelism": setting.num_threads or None,
        "single_submit": False,
        "overlap_events": True,
    }


def _words(setting: Setting) -> str:
    return f"{setting.block_bytes // 1024} KiB x {setting.queue_depth}, {setting.num_threads} thread(s)"


def _rates(rate: Rate) -> str:
    return f"write {rate.write / 1e9:.2f}, read {rate.read / 1e9:.2f} GB/s"


@contextmanager
def _speed_test(folder: Path, size: str) -> Iterator[SpeedTest]:
    from ds_core.io.speed import SpeedTest
    from ds_engine.cli.sizes import parse_bytes

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    with SpeedTest(folder, parse_bytes(size)) as test:
        yield test


@contextmanager
def _reported(command: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"ds nvme {command}: {error}", err=True)
        raise typer.Exit(2) from None


def _show(rates: list[Rate], chosen: Rate, as_json: bool, settings: dict[str, Any] | None = None) -> None:
    """Prints a table or JSON.

    Args:
        settings: sections for the configuration, as measured. Default: `aio` alone.
    """
    if as_json:
        rows = [
            {**section(r.setting), "write_bytes_per_s": round(r.write), "read_bytes_per_s": round(r.read)}
            for r in rates
        ]
        result = {
            **(settings or {"aio": section(chosen.setting)}),
            "backend": chosen.backend,
            "direct": chosen.direct,
            "measured": rows,
        }
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("block KiB", "queue depth", "threads", "write GB/s", "read GB/s", box=None, pad_edge=False)
    for rate in rates:
        setting = rate.setting
        cells = (
            str(x)
            for x in (setting.block_bytes // 1024, setting.queue_depth, setting.num_threads or "default")
        )
        style = "bold green" if rate is chosen and len(rates) > 1 else None
        table.add_row(*cells, f"{rate.write / 1e9:.2f}", f"{rate.read / 1e9:.2f}", style=style)
    console = Console()
    console.print(table)
    how = "O_DIRECT" if chosen.direct else "through the page cache: this file system has no direct I/O"
    console.print(f"{chosen.backend}, {how}")
    if len(rates) > 1:
        console.print('for ds_config.json:  "aio": ' + json.dumps(section(chosen.setting)), soft_wrap=True)
