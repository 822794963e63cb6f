"""Experts of Hugging Face models, divided among ranks and computed by grouped products, without changing the model.

Transformers keeps the experts of a layer in one module with stacked weights, and calls it with the tokens, their
experts and weights: `experts(hidden_states, top_k_index, top_k_weights)`. `convert` puts a module with the same call
and the same parameter names in its place. Routers, shared experts and auxiliary losses stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.dispatch.exchange import ExpertGroup
from ds_moe.dispatch.permute import collect, spread
from ds_moe.dispatch.plan import layout
from ds_moe.errors import ExpertParallelError
from ds_moe.experts.divided import copied, summed
from ds_moe.experts.grouped_linear import grouped_linear
from ds_moe.local import checked_group, local_experts
from ds_moe.parallel import run_experts
from ds_moe.report import LayerCounters


class ConvertedExperts(nn.Module):
    """This rank's experts of one layer: down(act(gate(x)) * up(x)), with stacked weights.

    Legend: E experts of this rank, H hidden size, I inner size.
    """

    def __init__(self, original: Any, ep_size: int, index: int | None = None) -> None:
        """
        Args:
            original: a module of Transformers' with `gate_up_proj`, `down_proj`, `act_fn` and `num_experts`.
            index: which of `ep_size` runs of experts this rank holds. None: by the number of the rank.
        """
        super().__init__()
        self.num_experts, self.ep_size = int(original.num_experts), ep_size
        self.local = local_experts(self.num_experts, ep_size, index)
        self.act_fn: Callable[[Tensor], Tensor] = original.act_fn
        self.gate_up_proj = self._own(original.gate_up_proj)
        """(E, 2 I, H)."""
        self.down_proj = self._own(original.down_proj)
        """(E, H, I)."""
        self.counters = LayerCounters()
        self.divides_experts = False
        """Whether tensor-parallel ranks hold parts of experts, where there are such ranks."""
        self._tensor_group: dist.ProcessGroup | None = None
        self._to: ExpertGroup | None = ExpertGroup(None) if ep_size == 1 else None

    def _own(self, whole: nn.Parameter) -> nn.Parameter:
        if self.ep_size == 1:
            return whole
        # The same object, so that an optimizer that has it stays valid.
        whole.data = whole.detach()[self.local.start : self.local.stop].clone()
        return whole

    def connect(self, to: ExpertGroup) -> None:
        """Sets the ranks that hold the experts; `expert_mesh` calls it."""
        self._to = checked_group(to, self.ep_size, self.local)

    @property
    def expert_index(self) -> int:
        """Which of `ep_size` equal runs of experts this rank holds."""
        return self.local.start // len(self.local)

    def set_expert_index(self, index: int) -> None:
        """Says that the values of the experts are those of another run now."""
        self.local = local_experts(self.num_experts, self.ep_size, index)

    def expert_values(self) -> list[Tensor]:
        """Returns the parameters and buffers of this rank's experts."""
        return [*self.parameters(), *self.buffers()]

    def expert_parameters(self) -> dict[str, bool]:
        """Returns the names of the parameters of experts, and whether their first dimension is the experts."""
        return {"gate_up_proj": True, "down_proj": True}

    def tensor_dims(self) -> dict[str, tuple[int, int]]:
        """Returns name -> dimension along which tensor-parallel ranks cut a parameter, and number of its sections."""
        return {"gate_up_proj": (1, 2), "down_proj": (2, 1)}

    def divide(self, group: dist.ProcessGroup) -> None:
        """Says that the parameters are this rank's parts now, among the ranks of `group`."""
        self._tensor_group = group

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """From tokens (T, H), their experts (T, K) and weights (T, K) to (T, H). Collective among the ranks of the
        expert-parallel group; T may be 0.
        """
        if self._to is None:
            raise ExpertParallelError(
                f"these experts are divided among {self.ep_size} ranks, but know no group: call "
                "ds_moe.expert_mesh(model) on all ranks before the first forward"
            )
        if self.training and torch.is_grad_enabled():
            self.counters.add_choices(top_k_index, self.num_experts)
        out, _ = run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            None,
            num_experts=self.num_experts,
            run=self._run,
            to=self._to,
            traffic=self.counters.traffic,
        )
        return out

    def _run(self, rows: Tensor, sizes: list[int]) -> Tensor:
        if self._tensor_group is None:
            return self._products(rows, sizes)
        return summed(self._products(copied(rows, self._tensor_group), sizes), self._tensor_group)

    def _products(self, rows: Tensor, sizes: list[int]) -> Tensor:
        groups = layout(sizes, rows.shape[1], rows.device.type)
        index = groups.index(rows.device)
        gate_up = grouped_linear(spread(rows, index, groups.num_rows), self.gate_up_proj, None, groups)
        gate, up = gate_up.chunk(2, dim=-1)
        return collect(grouped_linear(self.act_fn(gate) * up, self.down_proj, None, groups), index)

    def extra_repr(self) -> str:
        """Returns which experts this rank holds."""
        return f"experts {self.local.start} to {self.local.stop - 1} of {self.num_experts}"


def convert(model: nn.Module, *, ep_size: int = 1, index: int | None = None) -> nn.Module:
    """Replaces the experts of a Hugging Face model (Mixtral, Qwen-MoE, DeepSeek-V3 and others with the same layout), in
    place, and returns the model. No token is dropped.

    With `ep_size` > 1 each of `ep_size` consecutive ranks keeps a run of the experts; call `expert_mesh(model)`
    afterwards. All ranks must have the same weights before. Parameters stay the same objects.

    Args:
        index: which of `ep_size` equal runs of experts this rank keeps, its place in the data axis modulo `ep_size`.
            None: the number of the rank modulo `ep_size`.

    Raises:
        ValueError: the model has no experts of this layout; `ExpertParallelError` if `ep_size` does not fit.
    """
    replaced = 0
    problems: list[str] = []
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            problem = why_not_converted(child)
            if problem is None:
                module.register_module(child_name, ConvertedExperts(child, ep_size, index))
                replaced += 1
            elif problem:
                problems.append(f"{name}.{child_name}: {problem}")
    if problems or not replaced:
        raise ValueError(
            f"{type(model).__name__}: "
            + (
                problems[0]
                if problems
                else "no module with stacked experts (gate_up_proj, down_proj) was found"
            )
        )
    return model


def why_not_converted(module: nn.Module) -> str | None:
    """Returns why a module cannot be converted; "" if it is no module with experts, None if it can."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == 3):
        return ""
    kind = type(module).__name__
    if {n for n, _ in module.named_parameters()} != {"gate_up_proj", "down_proj"}:
        return f"{kind} has further parameters: {sorted(n for n, _ in module.named_parameters())}"
    for attribute, wanted in (
        ("has_gate", True),
        ("has_bias", False),
        ("has_post_expert_norm", False),
        ("is_transposed", False),
        ("is_concatenated", True),
    ):
        if getattr(module, attribute, wanted) != wanted:
            return f"{kind}.{attribute} is {not wanted}, which is not supported"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"{kind} has a gate of its own"
    experts, twice, hidden = gate_up.shape
    if down.shape != (experts, hidden, twice // 2) or not hasattr(module, "act_fn"):
        return f"{kind} has weights of shapes {tuple(gate_up.shape)} and {tuple(down.shape)}"
    return None
