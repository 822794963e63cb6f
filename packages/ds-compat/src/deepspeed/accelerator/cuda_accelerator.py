"""The accelerator of torch's device type "cuda". Programs find accelerators by these files."""

from ds_compat.device import CUDA_Accelerator

__all__ = ["CUDA_Accelerator"]
