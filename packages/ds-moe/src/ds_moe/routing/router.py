"""The router of a layer: its weights, and the bias that balances experts without a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ds_moe.options import RouterOptions
from ds_moe.routing.selection import Routing, route

JITTER = 0.01
"""Half the width of the interval around 1 from which jitter is drawn."""


class Router(nn.Module):
    """Scores every token for every expert with one matrix, in fp32 whatever the dtype of the model."""

    def __init__(self, hidden_size: int, options: RouterOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(options.num_experts, hidden_size))
        self.bias: Tensor | None
        """(E,) fp32, added to the scores when experts are chosen; None without `bias_rate`."""
        self.register_buffer("bias", torch.zeros(options.num_experts) if options.bias_rate else None)
        self.pending_counts: Tensor | None = None
        """(E,) int64: tokens that chose each expert since the last `update_bias`; None before the first."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor, used: Tensor | None = None) -> Routing:
        """Chooses experts.

        Args:
            hidden: (T, H).
            used: (T,) bool, tokens that take part. None: all.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            if self.training and self.options.noise == "jitter":
                wide = wide * torch.empty_like(wide).uniform_(1 - JITTER, 1 + JITTER)
            logits = functional.linear(wide, self.weight.to(wide.dtype))
            routing = route(logits, self.options, training=self.training, used=used, bias=self.bias)
        if self.bias is not None and self.training and torch.is_grad_enabled():
            counts = routing.counts
            self.pending_counts = counts if self.pending_counts is None else self.pending_counts + counts
        return routing

    def update_bias(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Moves the bias of every expert by `bias_rate` against its load since the last call. Collective.

        Args:
            groups: the axes of ranks that have different tokens; none: this process alone.

        Source: Wang et al., Auxiliary-loss-free load balancing (2024), algorithm 1.
        """
        if self.bias is None:
            return
        counts = self.pending_counts
        counts = torch.zeros_like(self.bias) if counts is None else counts.to(self.bias)
        for group in groups:
            dist.all_reduce(counts, group=group)
        self.bias += self.options.bias_rate * torch.sign(counts.mean() - counts)
        self.pending_counts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bias = self.bias
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Small steps of the bias would vanish in bf16.
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return applied

    def extra_repr(self) -> str:
        """Returns the sizes."""
        return f"{self.weight.shape[1]}, {self.options}"
