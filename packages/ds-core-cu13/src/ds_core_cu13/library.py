"""The path of the CUDA library."""

from __future__ import annotations

from pathlib import Path

import ds_core_cu13

NAME = "libds_core_cuda.so"


def library_path() -> Path:
    """Returns the file that ds_core opens. Raises FileNotFoundError if it has not been built, as in a source tree."""
    for folder in ds_core_cu13.__path__:
        path = Path(folder) / NAME
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{NAME} is not beside {__file__}: install the package from its wheel, or build it with nvcc 12.8 or newer: "
        "pip install packages/ds-core-cu13"
    )
