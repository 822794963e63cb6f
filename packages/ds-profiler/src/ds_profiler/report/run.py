"""The record of a training job: what its folder holds, read into one value.

A folder holds the curves, either as CSV files with the columns position and value (one for each curve, as the
`csv_monitor` of DeepSpeed and ds-engine writes them) or as `log.jsonl` (one JSON object of numbers for each step).
`run.json` may hold everything else, each key if it is known:

    title           heading of the page
    starts          list of ISO 8601 dates: when the job was started, and each time it was continued
    facts           object of texts, shown as a table
    configuration   shown as JSON
    levels          object of losses to compare with, drawn as horizontal lines
    texts           object of further texts, each shown below its name
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RECORD, LOG = "run.json", "log.jsonl"
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training job."""

    title: str
    x_label: str
    """What the position of a value counts: "step" or "samples"."""
    curves: Mapping[str, Curve]
    """Name of each curve, and its points (position, value)."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What is known about the job, in the order in which it is shown."""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Losses to compare with, drawn as horizontal lines."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further parts of the page: heading and text."""
    starts: tuple[datetime, ...] = ()
    """When the job was started, and each time it was continued."""
    ended: datetime | None = None
    """When the last value was written."""


def read_run(folder: Path) -> Run:
    """Reads the folder of a job, which may still be running.

    Raises:
        ValueError: the folder does not exist, holds no curves, or a file in it is broken.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    log, tables = folder / LOG, sorted(folder.glob("*.csv"))
    if log.is_file():
        curves, x_label, last = _of_log(log), "step", log.stat().st_mtime
    elif tables:
        curves, x_label = {path.stem: _of_table(path) for path in tables}, "samples"
        last = max(path.stat().st_mtime for path in tables)
    else:
        raise ValueError(_where_to_look(folder))
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        raise ValueError(f"{folder} holds no values yet: the job has not finished a step")
    record = _read_record(folder / RECORD)
    texts = {str(name): str(text) for name, text in record.get("texts", {}).items()}
    if record.get("configuration"):
        texts["Configuration"] = json.dumps(record["configuration"], indent=2)
    return Run(
        title=record.get("title") or folder.resolve().name,
        x_label=x_label,
        curves=curves,
        facts={str(name): str(value) for name, value in record.get("facts", {}).items()},
        levels={str(name): float(value) for name, value in record.get("levels", {}).items()},
        texts=texts,
        starts=tuple(datetime.fromisoformat(text) for text in record.get("starts", [])),
        ended=datetime.fromtimestamp(last, timezone.utc),
    )


def continued(points: Iterable[tuple[float, float]]) -> Curve:
    """A curve without what a killed job wrote after its last checkpoint: where positions go back, the job continued
    there, and what was written later counts.
    """
    kept: list[tuple[float, float]] = []
    for point in points:
        while kept and kept[-1][0] >= point[0]:
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _of_table(path: Path) -> Curve:
    """The points of a CSV file. A line that is cut short (the job is writing it, or the disk was full) ends it."""
    points: list[tuple[float, float]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            try:
                at, value = (float(cell) for cell in row)
            except ValueError:
                if points:
                    break
                continue  # the header
            points.append((at, value))
    return continued(points)


def _of_log(path: Path) -> dict[str, Curve]:
    """Every number of every line, except its position `step`."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            step = float(row["step"])
        except json.JSONDecodeError:
            break  # cut short by a kill
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f'{path}, line {number}: every line is a JSON object with the number "step"'
            ) from None
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                columns.setdefault(name, []).append((step, float(value)))
    return {name: continued(points) for name, points in columns.items()}


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return record


def _where_to_look(folder: Path) -> str:
    below = sorted({path.parent for pattern in (LOG, "*.csv") for path in folder.glob(f"*/{pattern}")})
    if below:
        names = ", ".join(str(path) for path in below[-5:])
        return f"{folder} holds no curves, but folders in it do: {names}"
    return (
        f"{folder} holds no curves (*.csv or {LOG}): turn on csv_monitor in the configuration, and give the folder "
        "<output_path>/<job_name>"
    )
