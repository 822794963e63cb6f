"""The packages on every Python and torch that they are meant for, where an environment for the pair exists.

PYTHON=python3.10 DS_TORCH=2.11.0 DS_VENV=.venv-3.10-2.11 ci/test tests/core     makes one and keeps it
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bare import bare

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11", "2.12", "2.13")
# What a pair can break: the binding, the hooks and storages that sharding relies on, the engine on top.
SELECTION = ("tests/core", "tests/zero", "tests/engine")


def interpreter(python: str, torch_version: str) -> Path | None:
    if (python, torch_version) == (
        f"{sys.version_info.major}.{sys.version_info.minor}",
        torch.__version__[:4],
    ):
        return Path(sys.executable)
    path = bare.ROOT / f".venv-{python}-{torch_version}" / "bin" / "python"
    return path if path.exists() else None


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("torch_version", TORCHES)
@pytest.mark.parametrize("python", PYTHONS)
def test_pair(python, torch_version):
    path = interpreter(python, torch_version)
    if path is None:
        folder = f".venv-{python}-{torch_version}"
        pytest.skip(
            f"no environment {folder}: "
            f"PYTHON=python{python} DS_TORCH={torch_version}.0 DS_VENV={folder} ci/test tests/core makes one"
        )
    versions = bare.run(
        [str(path), "-c", "import sys, torch; print(*sys.version_info[:2], torch.__version__)"]
    ).split()
    assert ".".join(versions[:2]) == python
    assert versions[2].startswith(torch_version + ".")
    if path == Path(sys.executable):
        return  # the tests that run beside this one are the proof
    command = [str(path), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu and not full"]
    bare.run([*command, *SELECTION], cwd=bare.ROOT)
