"""Finds and loads the GPU library, on the first tensor that needs it and never at import."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_core import _native

LIBRARY = "libds_core_cuda.so"


@dataclass(frozen=True)
class GpuLibrary:
    """The result of the search for the GPU library."""

    path: Path | None
    """The loaded file; None if there is none."""
    reason: str
    """Why no library was loaded; empty if one was."""


def companion() -> str:
    """The import name of the package with the library for this torch, e.g. "ds_core_cu13"."""
    return f"ds_core_cu{(torch.version.cuda or '13').split('.')[0]}"


def _candidates() -> list[Path]:
    if named := os.environ.get("DS_CUDA_LIBRARY"):
        return [Path(named)]
    candidates = []
    spec = importlib.util.find_spec(companion())
    if spec is not None and spec.submodule_search_locations:
        candidates += [Path(folder) / LIBRARY for folder in spec.submodule_search_locations]
    return [*candidates, Path(str(_native.core.__file__)).parent / LIBRARY]


@functools.cache
def library() -> GpuLibrary:
    """Opens the GPU library, once per process."""
    if not _native.has_native():
        return GpuLibrary(None, str(_native.MISSING))
    if torch.version.cuda is None and "DS_CUDA_LIBRARY" not in os.environ:
        idle = [path for path in _candidates() if path.is_file()]
        return GpuLibrary(
            None, "this torch is built without CUDA" + "".join(f"; {p} is not loaded" for p in idle)
        )
    candidates = _candidates()
    for path in candidates:
        if path.is_file():
            try:
                _native.core.gpu_open(str(path))
            except RuntimeError as error:
                return GpuLibrary(None, f"{path} cannot be used: {error}")
            return GpuLibrary(path, "")
    places = ", ".join(str(path) for path in candidates)
    return GpuLibrary(None, f"not found at {places}; pip install {companion().replace('_', '-')}")


def is_live() -> bool:
    """Whether the GPU kernels can be called."""
    return library().path is not None


def takes(tensor: Tensor) -> bool:
    """Whether tensors of this device are taken by native kernels: those of the CPU or of the GPU library."""
    kind = tensor.device.type
    return (kind == "cpu" and _native.has_native()) or (kind == "cuda" and is_live())


def reason_against(device_type: str) -> str:
    """Returns why the library cannot be used for devices of this type, such as "cuda"; empty if it can."""
    if device_type != "cuda":
        return f"ds_core has no library for {device_type}"
    return library().reason
