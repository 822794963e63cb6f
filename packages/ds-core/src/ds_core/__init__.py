"""Native kernels for PyTorch, a pure-torch reference of each, huge-page memory, and fused optimizers over them."""

from ds_core import arena, host_limits, io, kernels, optim, pinned, reference

__version__ = "0.1.0"

__all__ = ["__version__", "arena", "host_limits", "io", "kernels", "optim", "pinned", "reference"]
