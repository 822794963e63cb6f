"""Mixture of experts: routing, dispatch, grouped experts, expert parallelism."""

from ds_moe.dispatch.exchange import ExpertGroup
from ds_moe.errors import ExpertParallelError
from ds_moe.experts import FeedForward
from ds_moe.hugging_face import convert
from ds_moe.interfaces import AllToAll
from ds_moe.layer import Extras, MoE, MoELayer
from ds_moe.mesh import ExpertMesh, connect_for_plan, expert_mesh, expert_parallel_layers, expert_sizes
from ds_moe.options import RouterOptions
from ds_moe.report import LayerReport
from ds_moe.routing.selection import Routing, route
from ds_moe.training import has_biases, has_experts, reports, update_biases

__version__ = "0.1.0"

__all__ = [
    "AllToAll",
    "ExpertGroup",
    "ExpertMesh",
    "ExpertParallelError",
    "Extras",
    "FeedForward",
    "LayerReport",
    "MoE",
    "MoELayer",
    "RouterOptions",
    "Routing",
    "connect_for_plan",
    "convert",
    "expert_mesh",
    "expert_parallel_layers",
    "expert_sizes",
    "has_biases",
    "has_experts",
    "reports",
    "route",
    "update_biases",
]
