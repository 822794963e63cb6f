"""Optimizers that use the kernels: ordinary `torch.optim.Optimizer`s that step all tensors in one native call."""

from ds_core.optim.adagrad import FusedAdagrad
from ds_core.optim.adam import FusedAdam
from ds_core.optim.base import Batch, FusedOptimizer
from ds_core.optim.lamb import FusedLamb
from ds_core.optim.lion import FusedLion
from ds_core.optim.muon import Muon, muon_groups
from ds_core.optim.sgd import FusedSGD

__all__ = [
    "Batch",
    "FusedAdagrad",
    "FusedAdam",
    "FusedLamb",
    "FusedLion",
    "FusedOptimizer",
    "FusedSGD",
    "Muon",
    "muon_groups",
]
