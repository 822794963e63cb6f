"""Tensor parallelism: ranks that hold different parts of each layer."""

from ds_layers.tensor._registry import cut_of
from ds_layers.tensor.cross_entropy import vocab_parallel_cross_entropy
from ds_layers.tensor.cut import Cut, joined
from ds_layers.tensor.localize import localize
from ds_layers.tensor.parallelize import parallelize
from ds_layers.tensor.parts import keep_part
from ds_layers.tensor.plan import Plan, infer_plan, matching, plan_of_specs

__all__ = [
    "Cut",
    "Plan",
    "cut_of",
    "infer_plan",
    "joined",
    "keep_part",
    "localize",
    "matching",
    "parallelize",
    "plan_of_specs",
    "vocab_parallel_cross_entropy",
]
