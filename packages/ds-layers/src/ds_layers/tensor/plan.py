"""Which layers of a model are cut, and how.

A plan maps patterns of module names (`*` stands for a number, or any one part of a name) to styles:

    column                each rank computes some outputs                        Linear, Conv1D
    column:3              so, for each of three sections: fused q, k and v
    column_gathered       and all ranks get all outputs: an output layer
    row                   each rank has some inputs, outputs are added           Linear, Conv1D
    vocabulary            each rank has some rows                                Embedding
    heads                 each rank has some columns: a number for each head     Embedding
    summed                whole, but its gradient is a part on each rank: norms of single heads
    replicated            whole

Transformers' names (colwise, rowwise, ...) mean the same.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

Plan = Mapping[str, str]

_STYLES: Mapping[str, str] = {
    "colwise": "column",
    "colwise_rep": "column_gathered",
    "colwise_gather_output": "column_gathered",
    "rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "replicated_with_grad_allreduce": "summed",
}
"""Transformers' names -> ours."""

_OWN = ("column", "column_gathered", "row", "vocabulary", "heads", "summed", "replicated")

_OF_EXPERTS = (
    "packed_colwise",
    "packed_rowwise",
    "moe_tp_experts",
    "moe_identity_expert",
    "grouped_gemm",
    "ep_router",
)
"""Transformers' styles of experts, which are not cut here: all tensor-parallel ranks compute whole ones, unless ds_moe
divides them."""

_PRESETS: Mapping[str, Plan] = {
    "gpt2": {
        "h.*.attn.c_attn": "column:3",
        "h.*.attn.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    "gpt_neox": {
        "layers.*.attention.query_key_value": "column",
        "layers.*.attention.dense": "row",
        "layers.*.mlp.dense_h_to_4h": "column",
        "layers.*.mlp.dense_4h_to_h": "row",
    },
    "t5": {
        "layer.*.SelfAttention.q": "column",
        "layer.*.SelfAttention.k": "column",
        "layer.*.SelfAttention.v": "column",
        "layer.*.SelfAttention.o": "row",
        "layer.*.SelfAttention.relative_attention_bias": "heads",
        "layer.*.EncDecAttention.q": "column",
        "layer.*.EncDecAttention.k": "column",
        "layer.*.EncDecAttention.v": "column",
        "layer.*.EncDecAttention.o": "row",
        "layer.*.DenseReluDense.wi": "column",
        "layer.*.DenseReluDense.wi_0": "column",
        "layer.*.DenseReluDense.wi_1": "column",
        "layer.*.DenseReluDense.wo": "row",
    },
    "opt": {
        "layers.*.self_attn.q_proj": "column",
        "layers.*.self_attn.k_proj": "column",
        "layers.*.self_attn.v_proj": "column",
        "layers.*.self_attn.out_proj": "row",
        "layers.*.fc1": "column",
        "layers.*.fc2": "row",
    },
}
"""`config.model_type` -> plan, for families without a `tp_plan` of their own."""

_COUNTS: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("split_size", "num_heads"),
    "opt": ("num_heads",),
    "t5": ("n_heads", "inner_dim"),
}
"""`config.model_type` -> numbers that an attention module of the family keeps, which become those of one rank."""


def infer_plan(model: nn.Module, *, vocabulary: bool = False) -> dict[str, str]:
    """Returns the plan of a model of Transformers: its `tp_plan`, or that of its family.

    Args:
        vocabulary: whether the output layer is cut, too, where the plan of the family does not say so.

    Raises:
        ValueError: the family is unknown.
    """
    config: Any = _config_of(model)
    plan = dict(getattr(model, "_tp_plan", None) or {})
    kind = str(getattr(config, "model_type", ""))
    if not plan and config is not getattr(model, "config", None):  # blocks, such as the stages of a pipeline
        whole = getattr(config, "base_model_tp_plan", None) or _PRESETS.get(kind, {})
        plan = {f"*.{name.partition('.*.')[2]}": style for name, style in whole.items() if ".*." in name}
    own = {
        name: style for name, style in plan.items() if style not in _OF_EXPERTS and ".experts." not in name
    }
    if not own and kind in _PRESETS:
        own = {f"*{name}": style for name, style in _PRESETS[kind].items()}
    if not own:
        raise ValueError(
            f"there is no tensor-parallel plan for {type(model).__name__}{f' ({kind})' if kind else ''}: pass plan=, "
            'such as {"layers.*.up": "column", "layers.*.down": "row"}, or partition_config in the section '
            "tensor_parallel"
        )
    if vocabulary:
        find: Any = getattr(model, "get_output_embeddings", None)
        output = find() if callable(find) else None
        name = next((n for n, m in model.named_modules() if m is output), None)
        if name is not None:
            own.setdefault(name, "column_gathered")
    return own


def _config_of(model: nn.Module) -> Any:
    """The configuration of a model of Transformers; of a list of its blocks, that which the blocks keep."""
    own = (getattr(module, "config", None) for module in model.modules())
    return next((c for c in own if hasattr(c, "model_type")), getattr(model, "config", None))


def matching(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Returns the entries of a plan that match a module: those for one stage of a pipeline."""
    names = [name for name, _ in model.named_modules()]
    return {p: style for p, style in plan.items() if any(_matches(p, name) for name in names)}


def plan_of_specs(specs: list[dict[str, Any]]) -> dict[str, str]:
    """Returns the plan of `partition_config.layer_specs`, whose patterns are regular expressions of parameter names.

    Raises:
        ValueError: an unknown partition_type, or a shape that means something else than equal sections.
    """
    plan: dict[str, str] = {}
    for spec in specs:
        kind = str(spec.get("partition_type", "column")).lower()
        styles = {"column": "column", "row": "row", "skip": "replicated"}
        if kind not in styles:
            raise ValueError(f"partition_type {kind!r} is unknown: it must be column, row or skip")
        style, shape = styles[kind], spec.get("shape")
        if shape is not None and style == "column":
            blocks = shape[0] if isinstance(shape, (list, tuple)) and isinstance(shape[0], int) else None
            if blocks is None or blocks < 1:
                raise ValueError(f"shape {shape!r} in layer_specs: give (number of equal sections, -1)")
            style = f"column:{blocks}"
        for pattern in spec.get("patterns", []):
            plan[f"re:{pattern}"] = style
    return plan


def styles_of(model: nn.Module, plan: Plan) -> dict[str, tuple[str, int]]:
    """Returns, for each module that a plan names, its style and number of sections.

    Raises:
        ValueError: an unknown style, or a pattern that matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    chosen: dict[str, tuple[str, int]] = {}
    unused = []
    for pattern, style in plan.items():
        parsed = _parsed(pattern, style)
        matching = [name for name in names if _matches(pattern, name)]
        if not matching:
            unused.append(pattern)
        for name in matching:
            chosen.setdefault(name, parsed)
    if unused and not chosen:
        raise ValueError(f"no module of the model matches the tensor-parallel plan: {unused}")
    return {name: style for name, style in chosen.items() if style[0] != "replicated"}


def _parsed(pattern: str, style: str) -> tuple[str, int]:
    name, _, sections = style.partition(":")
    name = _STYLES.get(name, name)
    if name not in _OWN or (sections and (not sections.isdigit() or name != "column")):
        raise ValueError(
            f"style {style!r} of {pattern!r} is not supported: the styles are {', '.join(_OWN)} and column:N"
        )
    return name, int(sections or 1)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], f"{name}.weight") is not None
    return fnmatch.fnmatchcase(name, pattern) and (
        pattern.startswith("*") or name.count(".") == pattern.count(".")
    )


def check_heads(model: nn.Module, size: int) -> None:
    """Raises ValueError if the ranks do not divide the heads of a model of Transformers."""
    config: Any = _config_of(model)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(
                f"{size} tensor-parallel ranks do not divide {key} {heads} of {type(model).__name__}: use a divisor"
            )


def adjust_counts(model: nn.Module, cut_names: set[str], size: int) -> None:
    """Divides the numbers of heads that attention modules keep, in modules with a layer that was cut."""
    kind = getattr(_config_of(model), "model_type", "")
    for name, module in model.named_modules():
        if any(child.rpartition(".")[0] == name for child in cut_names):
            for key in _COUNTS.get(kind, ()):
                value = getattr(module, key, None)
                if isinstance(value, int):
                    setattr(module, key, value // size)
