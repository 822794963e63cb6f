"""What must be the same on every machine of a job, and how differences are reported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_engine import __version__
from ds_engine.launch.devices import count_accelerators, torch_version

_VERSIONS = (("ds", "ds-engine"), ("python", "Python"), ("torch", "torch"))


def gather(kind: str, script: str, files: Sequence[str]) -> dict[str, Any]:
    """Returns the facts about this machine, in its current working directory: values that JSON can hold.

    kind: of the program: "script", "module" or "program".
    files: files of which the contents must be the same.
    """
    paths = {name: name for name in files}
    if kind == "module":
        origin = _origin(script)
        if origin is not None:
            paths[f"module {script}"] = origin
    return {
        "ds": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch_version(),
        "files": {name: _digest(path) for name, path in paths.items()},
        "program": shutil.which(script) is not None if kind == "program" else True,
        "module": kind != "module" or f"module {script}" in paths,
        "interpreter": sys.executable,
        "accelerators": count_accelerators(),
    }


def differences(
    host: str,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    script: str,
    folder: str,
    slots: Sequence[int],
) -> list[str]:
    """Returns one line for each fact about `host` for which the job cannot start there."""
    problems = [
        f"{host} has {title} {theirs[key] or 'not installed'}, this machine {ours[key] or 'not installed'}: "
        f"install the same version ({theirs['interpreter']} there)"
        for key, title in _VERSIONS
        if theirs[key] != ours[key]
    ]
    if not theirs["program"]:
        problems.append(f"{host} has no program {script!r} on the PATH")
    if not theirs["module"]:
        problems.append(f"{host} has no module {script!r} for {theirs['interpreter']}")
    for name, digest in theirs["files"].items():
        if digest is None:
            problems.append(f"{host} has no file {name!r} in {folder}: use a shared folder, or copy it there")
        elif digest != ours["files"].get(name):
            problems.append(f"{host} has another {name!r} in {folder} than this machine: copy this one there")
    if theirs["accelerators"] and max(slots) >= theirs["accelerators"]:
        problems.append(
            f"{host} has {theirs['accelerators']} accelerators, but the host file or a filter names slot {max(slots)}"
        )
    return problems


def _origin(module: str) -> str | None:
    sys.path.insert(0, os.getcwd())  # `python -m` searches this directory first
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    finally:
        sys.path.pop(0)
    return spec.origin if spec is not None else None


def _digest(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
