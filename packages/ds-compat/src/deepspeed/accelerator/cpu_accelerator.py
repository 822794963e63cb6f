"""The accelerator of torch's device type "cpu". Programs find accelerators by these files."""

from ds_compat.device import CPU_Accelerator

__all__ = ["CPU_Accelerator"]
