"""Training state in host memory and on disks: stores for sharded models, optimizers that run on the host, an optimizer
whose states are paged, and activations that are elsewhere between forward and backward.
"""

from ds_offload.activations.choice import BudgetTooSmall, LayerChoice, LayerCost, choose_layers
from ds_offload.activations.offload import ActivationOffload, offload_activations
from ds_offload.activations.options import ActivationOptions, ActivationStatistics
from ds_offload.activations.planned import PlannedActivationOffload
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
    "ActivationOffload",
    "ActivationOptions",
    "ActivationStatistics",
    "BudgetTooSmall",
    "CPUAdagrad",
    "CPUAdam",
    "CPUAdamW",
    "CPULamb",
    "CPULion",
    "CPUMuon",
    "CPUSGD",
    "HostStore",
    "LayerChoice",
    "LayerCost",
    "NVMeOptions",
    "NVMeStore",
    "PagedOptimizer",
    "PagingError",
    "PlannedActivationOffload",
    "SwapError",
    "TiersByKind",
    "Undoable",
    "choose_layers",
    "offload_activations",
]
