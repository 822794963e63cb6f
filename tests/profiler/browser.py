"""A page in headless Chromium, where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest

_CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
needs_chromium = pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium on the PATH")


def dom(file, width=1200):
    """The document after its scripts have run, as text."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    command = [_CHROMIUM, *options, f"--window-size={width},900", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
