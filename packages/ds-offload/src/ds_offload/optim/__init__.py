"""Optimizers for parameters in host memory."""

from ds_offload.optim.adagrad import CPUAdagrad
from ds_offload.optim.adam import CPUAdam, CPUAdamW
from ds_offload.optim.lamb import CPULamb
from ds_offload.optim.lion import CPULion
from ds_offload.optim.muon import CPUMuon
from ds_offload.optim.sgd import CPUSGD

__all__ = ["CPUSGD", "CPUAdagrad", "CPUAdam", "CPUAdamW", "CPULamb", "CPULion", "CPUMuon"]
