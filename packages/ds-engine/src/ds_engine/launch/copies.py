"""The folder in which ranks of a job keep copies of its state in memory, as the launcher sees it.

`ds_checkpoint.memory` writes and reads it. This module knows its name only, because the launcher does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

JOB = "DS_JOB"
"""Environment variable of every rank: the name of the job, the same at every restart."""
_BASE = "DS_MEMORY_FOLDER"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def folder_of(environ: Mapping[str, str]) -> Path | None:
    """Returns the folder of the job that has these variables; None if they do not name a job."""
    job = environ.get(JOB, "")
    if _NAME.fullmatch(job) is None:
        return None
    return Path(environ.get(_BASE) or "/dev/shm") / f"ds-copies-{os.getuid()}-{job}"


def remove(environ: Mapping[str, str]) -> None:
    """Removes the copies of a job on this machine, if there are any. No rank of it may be running."""
    folder = folder_of(environ)
    if folder is not None and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
