"""The model side: a list of layers, divided into stages, each on the rank that owns it."""

from ds_pipe.model.groups import PipelineGroups
from ds_pipe.model.layer_specs import LayerSpec, TiedLayerSpec
from ds_pipe.model.pipeline import Controls, Pipeline, PipelineOptions
from ds_pipe.model.pipeline_module import PipelineModule, undivided
from ds_pipe.model.profile import LayerProfile, profile_layers
from ds_pipe.model.replicated import Replicated
from ds_pipe.model.split import split
from ds_pipe.model.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

__all__ = [
    "Controls",
    "LayerProfile",
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "Pipeline",
    "PipelineGroups",
    "PipelineModule",
    "PipelineOptions",
    "ProcessTopology",
    "Replicated",
    "TiedLayerSpec",
    "profile_layers",
    "split",
    "undivided",
]
