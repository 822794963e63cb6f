"""Training state in host memory: a store for sharded models, and an Adam that steps it there."""

from ds_offload.host import HostStore
from ds_offload.optim import CPUAdam

__version__ = "0.1.0"

__all__ = ["CPUAdam", "HostStore"]
