"""The example of two machines: it builds its hosts, trains on both, and names a rank that is killed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from docs.blocks import ROOT
from harness import hosts

EXAMPLE = ROOT / "docs" / "examples" / "two_machines" / "run.py"


def test_it_trains_on_two_hosts() -> None:
    if (lacks := hosts.missing()) is not None:
        pytest.skip(lacks)
    small = ["--dim", "32", "--batch", "8", "--steps", "6"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *small], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 2 machines (host-a: 1, host-b: 1)" in done.stderr
    assert "loss" in done.stdout
