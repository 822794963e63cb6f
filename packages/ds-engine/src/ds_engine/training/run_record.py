"""`run.json` beside the curves of a job: what ran, when, with which configuration. `ds report` shows it."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_engine.files import write_whole
from ds_engine.training.startup_summary import rows

if TYPE_CHECKING:
    from ds_engine.engine import Engine

NAME = "run.json"


def write(engine: Engine, folder: Path) -> None:
    """Writes the record of a job that starts or continues. Starts in an earlier record of the folder are kept.

    A folder that cannot be written to is not an error here: the first step warns that curves are lost.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        record = {
            "title": "",
            "starts": [*_starts(path), datetime.now(timezone.utc).isoformat(timespec="seconds")],
            "facts": facts(engine),
            "configuration": engine.config.model_dump(exclude_unset=True, mode="json"),
        }
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def facts(engine: Engine) -> dict[str, str]:
    """What the start-up table says about the job, without reasons and memory; and the version of torch."""
    table = [(name, choice) for name, choice, _ in rows(engine)]
    last = next((i for i, (name, _) in enumerate(table) if name == "a rank holds"), len(table))
    told = {"model": f"{type(engine.module).__name__}, {dict(table)['model']}"}
    told |= {name: choice for name, choice in table[:last] if name != "model"}
    return told | {"torch": torch.__version__}


def _starts(path: Path) -> list[Any]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8")).get("starts", [])
    except (OSError, ValueError, AttributeError):
        return []  # no record, or one of another program
    return starts if isinstance(starts, list) else []
