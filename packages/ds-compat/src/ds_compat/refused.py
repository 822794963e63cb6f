"""Names of DeepSpeed that are not supported yet, or will not be.

They can be imported, because code imports more than it uses. Using one raises an error that names the package that
will support it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

PIPE = "ds-pipe (pipeline parallelism)"
MOE = "ds-moe (mixture of experts)"
LAYERS = "ds-layers (tensor and sequence parallelism, sparse attention)"
ENGINE = "ds-engine"
OFFLOAD = "ds-offload (states on the host and on NVMe)"
COMM = "ds-comm (compressed communication)"
NONE = ""

OWNERS: Mapping[str, str] = {
    name: owner
    for owner, names in {
        PIPE: "DualPipeVEngine DualPipeVModule _prime_factors TrainSchedule InferenceSchedule DataParallelSchedule",
        MOE: "Experts TopKGate MOELayer top1gating top2gating topkgating _route_slots _sparse_decode "
        "_sparse_encode",
        LAYERS: "set_autotp_mode get_shard_size_list get_shard_size LinearAllreduce LinearLayer "
        "LmHeadLinearAllreduce _SeqAllToAll _rotate_half _torchembed_available "
        "apply_rotary_pos_emb FPDT_InputConstruct _FPDTGPUOffloadingAttentionImpl_ "
        "DeepSpeedTransformerLayer DeepSpeedTransformerConfig",
        ENGINE: "Autotuner ResourceManager init_compression "
        "redundancy_clean ds_to_universal DeepSpeedDataSampler DataAnalyzer RandomLTDScheduler",
        OFFLOAD: "GDSBuilder",
        COMM: "CompressedBackend",
        NONE: "LoRAOptimizedLinear OptimizedLinear LoRAConfig QuantizationConfig init_lora DeepSpeedHybridEngine "
        "CUDAQuantizer MultipleAllGatherHandles ZenFlowConfig ZenFlowCPUAdam ZenFlowSelectiveAdamW MuSGD MuAdam "
        "MuAdamW replace_transformer_layer QuantizedLinear Loss_Scaler_Apex",
    }.items()
    for name in names.split()
}

INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(
        ("Experts", "TopKGate", "MOELayer", "top1gating", "top2gating", "topkgating"),
        "ds_moe (docs/guide/mixture-of-experts.md)",
    ),
    "DataAnalyzer": "ds_engine.sampling.Analyzer (docs/guide/data.md)",
    "DualPipeVModule": 'PipelineModule(schedule="dualpipev") (docs/guide/pipeline.md)',
    "TrainSchedule": 'ds_pipe.make("1f1b", num_ranks, num_microbatches) (docs/guide/pipeline.md)',
    "InferenceSchedule": 'ds_pipe.make("inference", num_ranks, num_microbatches) (docs/guide/pipeline.md)',
    "DeepSpeedDataSampler": "ds_engine.sampling.CurriculumOrder, or the section data_efficiency (docs/guide/data.md)",
}


class NotThereError(NotImplementedError):
    """A part of DeepSpeed that the installed ds packages do not support. The message names the package that will."""


def why(name: str) -> str:
    """Returns the message for the use of `name`."""
    owner = OWNERS[name]
    if name in INSTEAD:
        return f"deepspeed's {name} has other arguments here: use {INSTEAD[name]}"
    if owner:
        return f"deepspeed's {name} belongs to {owner}, which this version does not have yet"
    return f"deepspeed's {name} is not part of the ds packages, and there is no plan for it"


class _Refuses(type):
    """Replaces classes and functions: a call raises NotThereError; isinstance and issubclass return False."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotThereError(why(cls.__name__))

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotThereError(why(cls.__name__))


def __getattr__(name: str) -> Any:
    if name not in OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _Refuses(name, (), {"__doc__": why(name), "__module__": "deepspeed"})
    globals()[name] = made  # the same class at every import, for isinstance
    return made
