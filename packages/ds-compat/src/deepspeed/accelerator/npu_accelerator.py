"""The accelerator of torch's device type "npu". Programs find accelerators by these files."""

from ds_compat.device import NPU_Accelerator

__all__ = ["NPU_Accelerator"]
