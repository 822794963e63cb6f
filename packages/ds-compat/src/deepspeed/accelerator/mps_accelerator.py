"""The accelerator of torch's device type "mps". Programs find accelerators by these files."""

from ds_compat.device import MPS_Accelerator

__all__ = ["MPS_Accelerator"]
