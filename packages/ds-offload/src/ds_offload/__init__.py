"""Training state in host memory and on disks: stores for sharded models, optimizers that run on the host, and an
optimizer whose states are paged.
"""

from ds_offload.host import HostStore
from ds_offload.nvme.options import NVMeOptions
from ds_offload.nvme.store import NVMeStore, SwapError
from ds_offload.optim import CPUSGD, CPUAdagrad, CPUAdam, CPUAdamW, CPULamb, CPULion, CPUMuon
from ds_offload.paging.optimizer import PagedOptimizer
from ds_offload.paging.pager import PagingError
from ds_offload.tiers import TiersByKind
from ds_offload.undo import Undoable

__version__ = "0.1.0"

__all__ = [
    "CPUSGD",
    "CPUAdagrad",
    "CPUAdam",
    "CPUAdamW",
    "CPULamb",
    "CPULion",
    "CPUMuon",
    "HostStore",
    "NVMeOptions",
    "NVMeStore",
    "PagedOptimizer",
    "PagingError",
    "SwapError",
    "TiersByKind",
    "Undoable",
]
