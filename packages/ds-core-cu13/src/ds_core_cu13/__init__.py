"""The CUDA kernels of ds-core: one shared library, which ds_core finds and opens by itself."""

from ds_core_cu13.library import library_path

__all__ = ["library_path"]
