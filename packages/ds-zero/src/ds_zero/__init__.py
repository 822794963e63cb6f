"""ZeRO stages 0 to 3 for any PyTorch loop: who owns which shard of parameters, gradients and optimizer
states.
"""

from ds_zero.access import full_state_dict, gathered
from ds_zero.away import Away
from ds_zero.comm import Comm
from ds_zero.config import ZeroConfig
from ds_zero.counted import counted_memory
from ds_zero.deferred import deferred_init
from ds_zero.deviation import Difference, Verification
from ds_zero.forecast import PhaseMemory, Plan, Remedy
from ds_zero.memory import MemoryReport, Summary, describe, memory
from ds_zero.norms import squared_norm, total_norm
from ds_zero.order import RankOrderError
from ds_zero.parallel import MeshFor, ModelParallel, cut_by_model_parallelism
from ds_zero.pending import GradNorm
from ds_zero.plan import plan
from ds_zero.presence import Presence, presence
from ds_zero.records import ShardRecord, group_names, load_records, records
from ds_zero.scaler import DynamicScale, LossScaleError, LossScaler
from ds_zero.shard import shard
from ds_zero.state_dicts import load_full_state_dict
from ds_zero.store import ResidentStore
from ds_zero.train import clip_grad_norm_, destroy, grad_norm, no_sync
from ds_zero.units import set_leaf_modules
from ds_zero.values import get_full, get_local, local_range, set_full, set_local, update_full_grads
from ds_zero.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Away",
    "Comm",
    "Difference",
    "DynamicScale",
    "GradNorm",
    "LossScaleError",
    "LossScaler",
    "MemoryReport",
    "MeshFor",
    "ModelParallel",
    "Presence",
    "PhaseMemory",
    "Plan",
    "RankOrderError",
    "Remedy",
    "ResidentStore",
    "ShardRecord",
    "Summary",
    "Verification",
    "ZeroConfig",
    "clip_grad_norm_",
    "counted_memory",
    "cut_by_model_parallelism",
    "deferred_init",
    "describe",
    "destroy",
    "full_state_dict",
    "gathered",
    "grad_norm",
    "get_full",
    "get_local",
    "group_names",
    "load_full_state_dict",
    "load_records",
    "local_range",
    "memory",
    "no_sync",
    "presence",
    "plan",
    "records",
    "set_full",
    "set_leaf_modules",
    "set_local",
    "shard",
    "squared_norm",
    "total_norm",
    "update_full_grads",
    "verify",
]
