"""`python -m ds_core`."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_core import _gpu, _native, codes, kernels, report


def report_with(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ds_core"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_public_kernel_is_reported() -> None:
    names = {name for name in vars(kernels) if name.endswith("_step")}
    assert names <= set(report.KERNELS)
    assert all(hasattr(kernels, name) or hasattr(codes, name) for name in report.KERNELS)
    assert len(report.variants()) == 2 * len(report.KERNELS)


def test_the_report_names_target_and_versions() -> None:
    done = report_with(DS_CPU_TARGET="baseline")
    assert done.returncode == 0, done.stderr
    assert "CPU target       baseline" in done.stdout
    assert torch.__version__ in done.stdout
    assert _native.core.version in done.stdout
    for name in report.KERNELS:
        assert name in done.stdout


def test_the_report_names_the_backend_of_file_io(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _native.core.io_uring_reason()
    expected = f"threads with pread and pwrite; {reason}" if reason else "io_uring"
    assert f"\nfile I/O         {expected}\nGPUDirect        libcufile" in report.text()
    _native.core._io_set_faults([("io_uring_setup", 0, -1, errno.EPERM, -1, False)])
    try:
        told = report.text()
    finally:
        _native.core._io_set_faults([])
    assert (
        "file I/O         threads with pread and pwrite; io_uring: io_uring_setup: Operation not permitted"
        in told
    )
    monkeypatch.setattr(_native, "MISSING", "not built")
    assert "file I/O         none: it needs the native module" in report.text()


def test_a_target_that_this_cpu_lacks_is_an_error() -> None:
    done = report_with(DS_CPU_TARGET="neon")
    assert done.returncode == 1
    assert "DS_CPU_TARGET='neon' is no CPU target" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "libds_core_cuda.so"
    broken.write_text("not a library")
    done = report_with(DS_CUDA_LIBRARY=str(broken))
    assert done.returncode == 0, done.stderr
    assert f"CUDA library     none: {broken} cannot be used" in done.stdout
    done = report_with(DS_CUDA_LIBRARY=str(tmp_path / "absent.so"))
    assert "not found at " + str(tmp_path / "absent.so") in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_the_report_says_so() -> None:
    assert _gpu.library().path is not None or "without CUDA" in _gpu.library().reason
