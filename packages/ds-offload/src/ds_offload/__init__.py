"""Where training state rests: host memory, and optimizers that step it there."""

from ds_offload.host import HostStore
from ds_offload.optim import CPUAdam

__version__ = "0.1.0"

__all__ = ["CPUAdam", "HostStore"]
