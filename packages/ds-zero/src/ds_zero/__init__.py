"""ZeRO stages 0 to 3 for any PyTorch loop: optimizer states, gradients and parameters are sharded among ranks.

Prediction and proof, which training does not need, are imported on first use.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_zero.api.control import Control, control
from ds_zero.api.leaf_modules import set_leaf_modules
from ds_zero.api.loop import (
    clip_grad_norm_,
    destroy,
    foreign_gradients,
    grad_norm,
    no_sync,
    set_presentation,
    step_overlap,
)
from ds_zero.api.memory import MemoryReport, Summary, describe, memory
from ds_zero.api.shard import shard, shard_optimizer
from ds_zero.comm.agreement import require_same
from ds_zero.comm.collectives import Collectives, Comm
from ds_zero.comm.order import RankOrderError
from ds_zero.comm.topology import MeshFor, ModelParallel, cut_by_model_parallelism
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import ShardStoreError
from ds_zero.params.access import get_full, get_local, local_range, set_full, set_local, update_full_grads
from ds_zero.params.dcp import dcp_state_dict
from ds_zero.params.deferred import deferred_init
from ds_zero.params.divided_init import divided_init
from ds_zero.params.gathered import full_state_dict, gathered
from ds_zero.params.offload_states import Away
from ds_zero.params.records import ShardRecord, group_names, load_records, records
from ds_zero.params.state_dict import load_full_state_dict
from ds_zero.params.status import Presence, presence
from ds_zero.params.stores import ResidentStore
from ds_zero.runtime.checksums import ChecksumError
from ds_zero.runtime.early_step import StepOverlap
from ds_zero.runtime.gradients.grad_scale import GradNorm
from ds_zero.runtime.gradients.loss_scaler import DynamicScale, LossScaleError, LossScaler
from ds_zero.runtime.gradients.norms import squared_norm, total_norm
from ds_zero.runtime.gradients.usage import UnusedParameterError

if TYPE_CHECKING:
    from ds_zero.predict.measured_memory import counted_memory
    from ds_zero.predict.plan import plan
    from ds_zero.predict.report import PhaseMemory, Plan, Remedy
    from ds_zero.prove.deviation import Difference, Verification
    from ds_zero.prove.replicas import ReplicaError, check_replicas
    from ds_zero.prove.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Away",
    "ChecksumError",
    "Collectives",
    "Comm",
    "Control",
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
    "ReplicaError",
    "ResidentStore",
    "ShardRecord",
    "ShardStoreError",
    "StepOverlap",
    "Summary",
    "UnusedParameterError",
    "Verification",
    "ZeroConfig",
    "check_replicas",
    "clip_grad_norm_",
    "control",
    "counted_memory",
    "cut_by_model_parallelism",
    "dcp_state_dict",
    "deferred_init",
    "describe",
    "destroy",
    "divided_init",
    "foreign_gradients",
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
    "require_same",
    "set_full",
    "set_leaf_modules",
    "set_local",
    "set_presentation",
    "shard",
    "shard_optimizer",
    "squared_norm",
    "step_overlap",
    "total_norm",
    "update_full_grads",
    "verify",
]

_HOMES: Mapping[str, str] = {
    "Difference": "ds_zero.prove.deviation",
    "PhaseMemory": "ds_zero.predict.report",
    "Plan": "ds_zero.predict.report",
    "Remedy": "ds_zero.predict.report",
    "ReplicaError": "ds_zero.prove.replicas",
    "Verification": "ds_zero.prove.deviation",
    "check_replicas": "ds_zero.prove.replicas",
    "counted_memory": "ds_zero.predict.measured_memory",
    "plan": "ds_zero.predict.plan",
    "verify": "ds_zero.prove.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ds_zero' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
