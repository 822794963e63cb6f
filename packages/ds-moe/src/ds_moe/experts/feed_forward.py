"""The expert of most language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["gelu", "relu", "silu"]
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


class FeedForward(nn.Module):
    """Two matrices with an activation between them, or three if gated: down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _FUNCTIONS:
            raise ValueError(
                f"activation={activation!r}: it must be one of {', '.join(map(repr, _FUNCTIONS))}; for another, pass "
                "a module of your own as expert"
            )
        self.activation = activation
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., H) to (..., H)."""
        act = _FUNCTIONS[self.activation]
        inner = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(inner)  # type: ignore[no-any-return]
