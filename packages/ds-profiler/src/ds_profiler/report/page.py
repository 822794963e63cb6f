"""The page of a training job."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ds_profiler.files import write_whole
from ds_profiler.html import Chart, Line, Unit, document
from ds_profiler.report.run import Curve, Run, read_run

_PREFIX = re.compile(r"^(Train[/_])?Samples[/_]|^Train[/_]")
_VALIDATION = re.compile(r"valid|eval|test|held.?out", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One chart of the page, and which curves belong to it."""

    title: str
    takes: Callable[[str], bool]
    """Of the name of a curve, in small letters and without the engine's prefix."""
    y_label: str = ""
    unit: Unit = ""
    from_zero: bool = False


_KINDS = (
    _Kind(
        title="Loss",
        takes=lambda n: n in ("validation", "eval") or (n.endswith("loss") and n != "loss_scale"),
    ),
    _Kind(title="Learning rate", takes=lambda n: n in ("lr", "learning_rate")),
    _Kind(title="Gradient norm before clipping", takes=lambda n: n in ("grad_norm", "gradient_norm")),
    _Kind(title="Throughput, all ranks", takes=lambda n: n.endswith("_per_s"), from_zero=True),
    _Kind(
        title="Memory of rank 0",
        takes=lambda n: "memory" in n and n.endswith("bytes"),
        unit="bytes",
        from_zero=True,
    ),
    _Kind(
        title="Time of the parts of a step",
        takes=lambda n: n.startswith("elapsed_time_ms"),
        y_label="ms",
        from_zero=True,
    ),
    _Kind(title="Loss scale", takes=lambda n: n == "loss_scale"),
)


def write_report(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page of the job in `folder`, which may still be running. Returns where it is.

    Args:
        folder: holds curves and perhaps `run.json`; see `ds_profiler.report.read_run`.
        path: the file to write. Default: `report.html` in the folder.

    Raises:
        ValueError: the folder holds no curves.
    """
    out = Path(folder) / "report.html" if path is None else Path(path)
    write_whole(out, page(read_run(Path(folder))).encode())
    return out


def page(run: Run) -> str:
    """The page as text: facts, charts, and the further texts of the run."""
    charts = "\n".join(chart.svg() for chart in charts_of(run))
    texts = "".join(
        f"<h2>{html.escape(heading)}</h2><pre>{html.escape(text)}</pre>"
        for heading, text in run.texts.items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in _facts(run).items()
    )
    body = f'<table class="facts">{facts}</table>\n<div class="charts">\n{charts}\n</div>\n{texts}'
    return document(run.title, body)


def charts_of(run: Run) -> list[Chart]:
    """The charts of the page, in their order. Curves that no chart takes have one of their own each."""
    curves = {_short(name): points for name, points in run.curves.items()}
    charts = []
    for kind in _KINDS:
        chosen = {name: curves.pop(name) for name in list(curves) if kind.takes(name.lower())}
        if kind.title == "Loss scale" and all(
            value == 1 for points in chosen.values() for _, value in points
        ):
            continue
        if chosen:
            charts.append(_chart(run, kind, chosen))
    for name, points in curves.items():
        line = Line(name="", points=points, dotted=len(points) < 30)
        charts.append(Chart(title=name, lines=[line], x_label=run.x_label))
    return charts


def _chart(run: Run, kind: _Kind, curves: Mapping[str, Curve]) -> Chart:
    # The training loss first, so that it has the same colour on every page.
    names = sorted(curves, key=lambda name: (bool(_VALIDATION.search(name)), name))
    alone = len(names) == 1 and not (kind.title == "Loss" and run.levels)
    lines = [
        Line(
            name="" if alone else _legend(name),
            points=curves[name],
            dotted=bool(_VALIDATION.search(name)) and len(curves[name]) < 60,
        )
        for name in names
    ]
    if kind.title == "Loss":
        positions = [x for points in curves.values() for x, _ in points]
        ends = (min(positions), max(positions))
        lines += [
            Line(name=f"{name} {level:.4g}", points=[(x, level) for x in ends])
            for name, level in run.levels.items()
        ]
    y_label = kind.y_label
    if kind.title.startswith("Throughput") and alone:
        y_label = names[0].removesuffix("_per_s") + " per second"
    return Chart(
        title=kind.title,
        lines=lines,
        x_label=run.x_label,
        y_label=y_label,
        unit=kind.unit,
        from_zero=kind.from_zero,
    )


def _facts(run: Run) -> dict[str, str]:
    shown = dict(run.facts)
    if run.starts:
        shown["started"] = _date(run.starts[0])
        if len(run.starts) > 1:
            shown["continued"] = ", ".join(_date(start) for start in run.starts[1:][-5:])
    if run.ended is not None:
        shown["last value written"] = _date(run.ended)
        if len(run.starts) == 1:
            shown["duration"] = str(timedelta(seconds=round((run.ended - run.starts[0]).total_seconds())))
    for name, points in run.curves.items():
        if re.search(r"(^|_)loss$|^validation$", _short(name)):
            shown[f"last {_legend(_short(name))} loss"] = (
                f"{points[-1][1]:.4g} at {run.x_label} {points[-1][0]:,.0f}"
            )
    return shown


def _short(name: str) -> str:
    return _PREFIX.sub("", name)


def _legend(name: str) -> str:
    """Returns "train" for "train_loss" and for "loss", and "forward" for "elapsed_time_ms_forward"."""
    text = (
        name.removeprefix("elapsed_time_ms_").removesuffix("loss").replace("_", " ").replace("/", " ").strip()
    )
    return text or "train"


def _date(at: datetime) -> str:
    return at.astimezone().strftime("%d %B %Y, %H:%M:%S %Z")
