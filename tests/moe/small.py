"""A small model with a mixture of experts, and its training by plain loops on one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import ds_moe
from ds_moe.layer import MoELayer

H = 8


class Small(nn.Module):
    """Two mixtures of experts between dense layers."""

    def __init__(self, ep_size: int, *, num_experts: int = 4, by: str = "auto", **arguments: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(H, H)
        make = expert_of(by)
        layers = [
            ds_moe.MoE(
                H,
                make,
                num_experts,
                ep_size,
                experts_by=by,
                top2_2nd_expert_sampling=False,
                use_rts=False,
                **arguments,  # type: ignore[arg-type]
            )
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of tokens (T, H); a rank without tokens has only auxiliary losses."""
        x, aux = torch.tanh(self.first(x)), x.new_zeros(())
        for layer in self.layers:
            out, own, _ = layer(x)
            x, aux = x + out, aux + own
        return self.last(x).square().sum() / 8 + 0.01 * aux


def expert_of(by: str) -> object:
    return lambda: ds_moe.FeedForward(H, 12, activation="silu", gated=by == "auto")


def batch(step: int, rank: int, numel: int = 9) -> Tensor:
    return torch.randn(numel, H, generator=torch.Generator().manual_seed(1000 * step + rank))


def whole_of(model: Small, arguments: dict[str, object]) -> Small:
    """The same model with all experts, computed by the loop of reference."""
    return Small(1, **arguments)  # type: ignore[arg-type]


def mean_grads(model: nn.Module, batches: Sequence[Tensor], divisor: int) -> float:
    """Backward over all batches, divided by the number of ranks; returns the sum of losses."""
    total = 0.0
    for one in batches:
        loss = model(one)
        (loss / divisor).backward()
        total += loss.item()
    return total


def with_loops(model: nn.Module) -> nn.Module:
    """A copy whose grouped products are done expert by expert, by `linear`."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, MoELayer):
            module.experts.forward = _loop(module)  # type: ignore[method-assign]
    return copied


def _loop(layer: MoELayer) -> object:
    names = [n for n, _ in layer.experts.expert.named_parameters()]  # type: ignore[union-attr]
    template = ds_moe.FeedForward(H, 12, activation="silu", gated=any(n.startswith("gate") for n in names))

    def run(rows: Tensor, sizes: list[int]) -> Tensor:
        outputs = []
        for index, part in enumerate(rows.split(sizes)):
            outputs.append(torch.func.functional_call(template, layer.experts.expert_state(index), (part,)))
        return torch.cat(outputs)

    return run
