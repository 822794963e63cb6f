"""Run directories: runs/gpt/001, 002, ...; the last one is continued until it is finished.

A run directory holds settings.json (what it was started with), log.jsonl (one line per step), run.json (what
`ds report` shows beside the curves), checkpoints/, and at the end report.html, sample.txt and result.json.
result.json is written last: a directory with it is finished.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def choose(base: Path, settings: dict[str, Any]) -> Path:
    """The run to continue: the newest, if unfinished and started with the same settings; else a new one."""
    numbers = sorted(int(p.name) for p in base.glob("[0-9]*") if p.name.isdigit())
    if numbers:
        last = base / f"{numbers[-1]:03d}"
        # A process killed before its settings were written has left an empty directory, which can be used.
        started_with = read_json(last / "settings.json", default=settings)
        if started_with == settings and not (last / "result.json").exists():
            return _prepared(last, settings)
    return _prepared(base / f"{(numbers[-1] if numbers else 0) + 1:03d}", settings)


def _prepared(run: Path, settings: dict[str, Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "settings.json", json.dumps(settings, indent=2) + "\n")
    return run


def read_json(path: Path, *, default: Any) -> Any:
    """The parsed file, or `default` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def write_atomic(path: Path, text: str) -> None:
    """The file appears with all of its text or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def note_start(run: Path, record: dict[str, Any]) -> None:
    """Writes run.json for a run that is started or continued now; the dates of earlier starts stay in it."""
    path = run / "run.json"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    starts = [*read_json(path, default={}).get("starts", []), now]
    write_atomic(path, json.dumps(record | {"starts": starts}, indent=1) + "\n")


def add_to_record(run: Path, **more: dict[str, Any]) -> None:
    """Adds entries to parts of run.json: facts, levels, texts."""
    record = read_json(run / "run.json", default={})
    for part, entries in more.items():
        record[part] = record.get(part, {}) | entries
    write_atomic(run / "run.json", json.dumps(record, indent=1) + "\n")


class Log:
    """One line of JSON per step, appended as the steps happen."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Opens the log for steps from `first_step` (1 is the first of a training) on.

        What a killed process wrote after its last checkpoint will be written again, so it is dropped.
        """
        kept = [row for row in read_log(path) if row["step"] < first_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Appends a line; it is in the file when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last one may be cut short by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
