"""A host may end at any moment of a write of copies: the other one always has a complete generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_host_ends_at_each_moment_of_a_write(tmp_path: Path) -> None:
    script = Path(__file__).with_name("dying_host.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.split() == ["28"]
