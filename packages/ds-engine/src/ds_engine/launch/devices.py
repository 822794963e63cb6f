"""Counts the accelerators for a job, without importing torch into the launcher."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

# Each runs in a process of its own, so that the launcher never opens a device. The driver's own count
# respects the *_VISIBLE_DEVICES variables and MIG slices.
_ASK_CUDA = """
import ctypes
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
print(count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0)
"""
_ASK_TORCH = """
import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)
"""
_ASK_TIMEOUT_S = 120.0


def torch_build() -> str | None:
    """Returns the accelerator of the installed torch build: "cuda", "hip", "xpu", or None for a CPU build (or no
    torch).
    """
    text = _version_file()
    for kind in ("cuda", "hip", "xpu"):
        if re.search(rf"^{kind}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return kind
    return None


def torch_version() -> str | None:
    """Returns the version of the installed torch; None without one."""
    match = re.search(r"^__version__\b[^=\n]*=\s*['\"]([^'\"]+)", _version_file(), re.MULTILINE)
    return match[1] if match is not None else None


def _version_file() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    version = Path(spec.origin).with_name("version.py")
    return version.read_text() if version.exists() else ""


def count_accelerators() -> int:
    """Returns the number of accelerators that torch can use in a new process; 0 for a CPU build of torch."""
    build = torch_build()
    if build is None:
        return 0
    if build == "cuda" and not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return 0  # no driver, so no process needs to be started
    source = _ASK_CUDA if build == "cuda" else _ASK_TORCH
    try:
        answer = subprocess.run(
            [sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0
    count = answer.stdout.strip()
    return int(count) if count.isdigit() else 0
