"""The experts of one rank as one module: stacked, where the expert's module permits it, or one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.dispatch.permute import collect, spread
from ds_moe.dispatch.plan import Layout, layout
from ds_moe.errors import ExpertParallelError
from ds_moe.experts import native_feed_forward
from ds_moe.experts.divided import copied, summed, with_bias
from ds_moe.experts.feed_forward import FeedForward
from ds_moe.experts.grouped_linear import CurrentGroups, GroupedLinear, is_native

Method = Literal["auto", "grouped", "loop"]
ExpertSource = nn.Module | Callable[[], nn.Module]
"""One expert, of which all others are copies; or a function that makes one, called once for each expert."""

# Modules that treat every row by itself.
_ROW_WISE = (
    nn.Linear,
    nn.Dropout,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ReLU6,
    nn.ELU,
)


class StackedExperts(nn.Module):
    """Experts that consist of `nn.Linear` and of operations on single rows. The weights of each linear layer are one
    parameter (E, out, in); the rest of the expert's module runs on the rows of all experts at once.
    """

    stacked = True
    """Whether the first dimension of every parameter is the experts."""

    def __init__(self, like: nn.Module, num_experts: int) -> None:
        super().__init__()
        self._current = CurrentGroups()
        self.num_experts = num_experts
        self.expert = _with_grouped_layers(_copy_without_values(like), like, num_experts, self._current)
        self._linear_layers = tuple(m for m in self.modules() if isinstance(m, GroupedLinear))
        self._tensor_group: dist.ProcessGroup | None = None

    def put(self, index: int, expert: nn.Module) -> None:
        """Copies the values of one expert into the stack."""
        values = dict(expert.named_parameters())
        with torch.no_grad():
            for name, param in self.expert.named_parameters():
                param[index].copy_(values[name])

    def expert_state(self, index: int) -> dict[str, Tensor]:
        """Returns the values of one expert by the names of its module, as views."""
        return {name: param[index] for name, param in self.expert.named_parameters()}

    def tensor_dims(self) -> Mapping[str, tuple[int, int]]:
        """Returns along which dimension each parameter is cut among tensor-parallel ranks, and in how many sections.

        Raises:
            ExpertParallelError: the experts cannot be cut.
        """
        if type(self.expert) is not FeedForward:
            raise ExpertParallelError(
                f"experts {type(self.expert).__name__} cannot be cut among tensor-parallel ranks: only those of "
                "ds_moe.FeedForward and of converted Hugging Face models can; use whole experts"
            )
        dims = {f"expert.{layer}.{kind}": (1, 1) for layer in ("up", "gate") for kind in ("weight", "bias")}
        dims["expert.down.weight"] = (2, 1)
        return {name: dims[name] for name, _ in self.named_parameters() if name in dims}

    def divide(self, group: dist.ProcessGroup) -> None:
        """Says that the parameters are this rank's parts now, among the ranks of `group`. [`tensor_dims`]"""
        self._tensor_group = group
        for layer in self._linear_layers:
            layer.out_features, layer.in_features = layer.weight.shape[1:]

    def forward(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """From the rows of all experts (n, H), in the order of experts, to their outputs (n, H)."""
        if self._tensor_group is not None:
            return self._of_parts(rows, sizes, self._tensor_group)
        dtype = _product_dtype(rows)
        if native_feed_forward.applies(self.expert, dtype, rows.shape[0]):
            return native_feed_forward.run(cast(FeedForward, self.expert), rows, sizes)
        if all(is_native(rows.shape[0], dtype, layer.weight) for layer in self._linear_layers):
            return self.run(rows, Layout(sizes))
        groups = layout(sizes, rows.shape[1], rows.device.type)
        index = groups.index(rows.device)
        return collect(self.run(spread(rows, index, groups.num_rows), groups), index)

    def _of_parts(self, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        """The same for this rank's part of each expert: outputs are added over the ranks, and the last bias once."""
        expert = cast(FeedForward, self.expert)
        rows = copied(rows, group)
        if native_feed_forward.applies(expert, _product_dtype(rows), rows.shape[0]):
            part = native_feed_forward.run(expert, rows, sizes, last_bias=False)
        else:
            down, bias = cast(GroupedLinear, expert.down), expert.down.bias
            down._parameters["bias"] = None
            try:
                part = self.run(rows, Layout(sizes))
            finally:
                down._parameters["bias"] = bias
        return with_bias(summed(part, group), expert.down.bias, sizes)

    def run(self, rows: Tensor, groups: Layout) -> Tensor:
        """The same for rows that lie in memory as `groups` says."""
        self._current.layout = groups
        try:
            out: Tensor = self.expert(rows)
            return out
        finally:
            self._current.layout = None


def _product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype in which linear layers compute: that of autocast, or that of the rows."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


class LoopedExperts(nn.Module):
    """Any modules, one after the other. Every expert is called in every forward, also without rows, so that all ranks
    gather sharded parameters in the same order, and every parameter has a gradient.
    """

    stacked = False

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.experts = nn.ModuleList(experts)

    def expert_state(self, index: int) -> dict[str, Tensor]:
        """Returns the values of one expert by the names of its module."""
        return dict(self.experts[index].named_parameters())

    def forward(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """From the rows of all experts (n, H), in the order of experts, to their outputs (n, H)."""
        return torch.cat([expert(part) for expert, part in zip(self.experts, rows.split(sizes), strict=True)])


def make_experts(
    source: ExpertSource, num_experts: int, local: range, method: Method
) -> StackedExperts | LoopedExperts:
    """Makes the experts of one rank.

    A function is called for every expert of the layer, in order, so that the values of an expert and the state of the
    random generator afterwards do not depend on the number of ranks.

    Args:
        num_experts: of the layer, on all ranks.
        local: indices of the experts of this rank.

    Raises:
        ValueError: `method` is "grouped", but the expert cannot be stacked.
    """
    if method not in ("auto", "grouped", "loop"):
        raise ValueError(f"experts_by={method!r}: it must be 'auto', 'grouped' or 'loop'")
    made = _made(source, num_experts, local)
    first = next(made)
    problem = None if method == "loop" else why_not_stacked(first)
    if problem is not None and method == "grouped":
        raise ValueError(
            f"experts_by='grouped', but experts {type(first).__name__} cannot be stacked: {problem}"
        )
    if method == "loop" or problem is not None:
        return LoopedExperts([first, *made])
    stack = StackedExperts(first, len(local))
    stack.put(0, first)
    for index, expert in enumerate(made, 1):
        stack.put(index, expert)
    return stack


def _made(source: ExpertSource, num_experts: int, local: range) -> Iterator[nn.Module]:
    """Yields this rank's experts one by one."""
    if isinstance(source, nn.Module):
        for _ in local:
            yield copy.deepcopy(source)
        return
    for index in range(num_experts):
        expert = source()
        if index in local:
            yield expert


def why_not_stacked(expert: nn.Module) -> str | None:
    """Returns the reason why copies of a module cannot share stacked weights; None if they can.

    All parameters must belong to `nn.Linear`, none twice, and a row's output must depend on nothing but the row. Known
    modules do; others are tried on small inputs.
    """
    owned = [p for m in expert.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)]
    ids = {id(p) for p in owned}
    if not owned:
        return "it has no nn.Linear"
    if len(ids) < len(owned):
        return "two of its layers share a parameter"
    others = [name for name, p in expert.named_parameters() if id(p) not in ids]
    if others:
        return f"parameter {others[0]!r} does not belong to an nn.Linear"
    if any(True for _ in expert.buffers()):
        return "it has buffers"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in expert.modules()):
        return "it has hooks"
    if _is_known(expert):
        return None
    return _differs_when_stacked(expert)


def _is_known(expert: nn.Module) -> bool:
    if type(expert) is FeedForward:
        return True
    return type(expert) is nn.Sequential and all(type(m) in _ROW_WISE for m in expert)


def _differs_when_stacked(expert: nn.Module) -> str | None:
    """Runs two small batches one by one and stacked."""
    first = next(expert.parameters())
    if first.is_meta:
        return "it is on the meta device, where it cannot be tried; give it values first, or use ds_moe.FeedForward"
    width = next(m for m in expert.modules() if type(m) is nn.Linear).in_features
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, width, generator=generator).to(first)
    was_training = [m for m in expert.modules() if m.training]
    expert.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = torch.cat([expert(rows[:3]), expert(rows[3:])])
            stack = StackedExperts(expert, 2).eval()
            for index in range(2):
                stack.put(index, expert)
            outcome = stack.run(rows, Layout([3, 4]))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        return f"its forward does not work with stacked weights ({type(error).__name__}: {error})"
    finally:
        for module in was_training:
            module.training = True
    bound = 64 * torch.finfo(first.dtype).eps
    if outcome.shape != expected.shape or not torch.allclose(outcome, expected, rtol=bound, atol=bound):
        return "the output of a row depends on other rows"
    return None


def _copy_without_values(module: nn.Module) -> nn.Module:
    """Returns a copy whose parameters are on the meta device, so that the weights of an expert are not copied."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _with_grouped_layers(
    copied: nn.Module, original: nn.Module, num_experts: int, current: CurrentGroups
) -> nn.Module:
    """Replaces every `nn.Linear` inside the copy by a grouped one with the device and dtype of the original's."""
    if type(original) is nn.Linear:
        return GroupedLinear(original, num_experts, current)
    for name, child in original.named_children():
        copied.register_module(
            name, _with_grouped_layers(copied.get_submodule(name), child, num_experts, current)
        )
    return copied
