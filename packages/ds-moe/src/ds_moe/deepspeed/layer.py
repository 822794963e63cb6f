"""`deepspeed.moe.layer.MoE`: the layer of ds_moe, with DeepSpeed's names in state dicts and its marks on parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe import layer as plain

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
_OURS_TO_THEIRS: Mapping[str, str] = {"router.weight": "deepspeed_moe.gate.wg.weight", "residual.": "mlp."}


class MoE(plain.MoE):
    """See `ds_moe.MoE`. Parameters of experts have DeepSpeed's marks `allreduce` and `group_name`, and state dicts its
    names: `deepspeed_moe.gate.wg.weight`, and `deepspeed_moe.experts.deepspeed_experts.<i>.*` for the i-th expert of
    this rank, which are views of stacked weights. `named_parameters` has the stacked ones under names of their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expert_group_name = f"ep_size_{self.ep_size}"
        self.num_local_experts = len(self.local)
        for param in self.experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_with_their_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_our_names)  # type: ignore[no-untyped-call]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Has nothing to do: `deepspeed.initialize` connects the layers of a model."""


def _expert_names(layer: nn.Module) -> Iterator[tuple[str, int, str]]:
    """Yields, for each value of an expert, its name within the expert, its expert, and the name of our parameter."""
    assert isinstance(layer, MoE)
    for index in range(layer.num_local_experts):
        for name in layer.experts.expert_state(index):
            ours = f"experts.expert.{name}" if layer.experts.stacked else f"experts.experts.{index}.{name}"
            yield name, index, ours


def _with_their_names(layer: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    assert isinstance(layer, MoE)
    values = {}
    for name, index, ours in _expert_names(layer):
        held = state.get(prefix + ours)
        if held is not None:
            values[f"{prefix}{EXPERTS}{index}.{name}"] = held[index] if layer.experts.stacked else held
    for key in [k for k in state if k.startswith(f"{prefix}experts.")]:
        del state[key]
    for ours, theirs in _OURS_TO_THEIRS.items():
        for key in [k for k in state if k.startswith(prefix + ours)]:
            state[prefix + theirs + key[len(prefix + ours) :]] = state.pop(key)
    state |= values


def _with_our_names(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(layer, MoE)
    for ours, theirs in _OURS_TO_THEIRS.items():
        for key in [k for k in state if k.startswith(prefix + theirs)]:
            state[prefix + ours + key[len(prefix + theirs) :]] = state.pop(key)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, index, ours in _expert_names(layer):
        value = state.pop(f"{prefix}{EXPERTS}{index}.{name}", None)
        if value is not None:
            stacks.setdefault(prefix + ours, {})[index] = value
    for ours, parts in stacks.items():
        if not layer.experts.stacked:
            [state[ours]] = parts.values()
        elif len(parts) == layer.num_local_experts:
            state[ours] = torch.stack([parts[i] for i in range(len(parts))])
