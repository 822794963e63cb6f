"""Which kernels are native on this machine, and why the others are not: the text of `python -m ds_core`."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass

import torch

from ds_core import _gpu, _native, arena

KERNELS = (
    "adam_step",
    "adagrad_step",
    "lion_step",
    "sgd_step",
    "lamb_step",
    "squared_norm",
    "squared_norm_blocks",
    "cast",
    "pack_signs",
    "unpack_signs",
    "checksums",
    "crc32c",
    "sign_encode",
    "sign_decode",
    "int_encode",
    "int_decode",
)
CPU_ONLY = ("crc32c",)
REFERENCE_ON_GPU = ("checksums",)
"""Kernels that run as the reference on a GPU."""


@dataclass(frozen=True)
class Variant:
    """The implementation of a kernel for one type of device."""

    kernel: str
    device: str
    """"cpu" or "gpu"."""
    native: bool
    reason: str
    """The CPU target or the library of a native variant; for the reference, why there is no native variant."""


def variants() -> list[Variant]:
    """Returns one entry per kernel and device, CPU first."""
    cpu_native = _native.has_native()
    cpu_reason = f"target {_native.core.cpu_target()}" if cpu_native else str(_native.MISSING)
    library = _gpu.library()
    gpu_reason = library.reason if library.path is None else library.path.name
    rows = [Variant(name, "cpu", cpu_native, cpu_reason) for name in KERNELS]
    for name in KERNELS:
        if name in CPU_ONLY:
            rows.append(Variant(name, "gpu", False, "runs on CPU memory only"))
        elif name in REFERENCE_ON_GPU:
            rows.append(Variant(name, "gpu", False, f"{name} has no kernel for GPUs"))
        else:
            rows.append(Variant(name, "gpu", library.path is not None, gpu_reason))
    return rows


def _cpu_lines() -> list[str]:
    if not _native.has_native():
        return [f"native module    absent: {_native.MISSING}"]
    core = _native.core
    return [
        f"native module    {core.__file__} ({core.version})",
        f"CPU target       {core.cpu_target()} (this CPU can run {', '.join(core.available_cpu_targets())}; "
        "DS_CPU_TARGET chooses)",
        f"threads          {torch.get_num_threads()}, "
        + (
            "of the OpenMP team in this process"
            if core.thread_source() == "openmp"
            else "of the module's own pool"
        ),
    ]


def _gpu_line() -> str:
    library = _gpu.library()
    if library.path is None:
        return f"CUDA library     none: {library.reason}"
    return f"CUDA library     {library.path}, {_native.core.gpu_num_devices()} device(s)"


def _arena_line() -> str:
    probe = arena.empty(1 << 20)
    stats = arena.stats()
    del probe
    return "arena            " + (
        "2 MiB pages" if stats.huge_pages else "ordinary pages: this system refuses MADV_HUGEPAGE"
    )


def _io_lines() -> list[str]:
    if not _native.has_native():
        return ["file I/O         none: it needs the native module"]
    reason = _native.core.io_uring_reason()
    return [
        "file I/O         " + ("io_uring" if not reason else f"threads with pread and pwrite; {reason}"),
        "GPUDirect        " + _cufile(),
    ]


def _cufile() -> str:
    """Whether NVIDIA's library for copies between disk and GPU is there."""
    try:
        ctypes.CDLL("libcufile.so.0")
    except OSError:
        return "libcufile.so.0 cannot be opened: copies between disk and GPU go through host memory"
    return "libcufile.so.0: ds_core.io.GpuDirect copies between disk and GPU; stores go through host memory"


def text() -> str:
    """Returns the whole report. Raises ValueError if DS_CPU_TARGET names a target that this CPU cannot run."""
    from ds_core import __version__

    lines = [
        f"ds_core          {__version__}",
        f"torch            {torch.__version__}",
        f"Python           {platform.python_version()} on {platform.system()} {platform.machine()}",
        *_cpu_lines(),
        _gpu_line(),
        _arena_line(),
        *_io_lines(),
        "",
        f"{'kernel':<20} {'CPU':<11} GPU",
    ]
    rows = variants()
    for on_cpu, on_gpu in zip(rows[: len(KERNELS)], rows[len(KERNELS) :], strict=True):
        words = ["native" if v.native else "reference" for v in (on_cpu, on_gpu)]
        if on_gpu.kernel in CPU_ONLY:
            words[1] = "-"
        lines.append(f"{on_cpu.kernel:<20} {words[0]:<11} {words[1]}")
    missing = {f"{v.device.upper()}: {v.reason}" for v in rows if not v.native and v.kernel not in CPU_ONLY}
    if missing:
        lines += ["", "reference = plain torch, because", *(f"  {reason}" for reason in sorted(missing))]
    return "\n".join(lines)
