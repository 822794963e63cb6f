"""The accelerator of torch's device type "xpu". Programs find accelerators by these files."""

from ds_compat.device import XPU_Accelerator

__all__ = ["XPU_Accelerator"]
