"""Feed-forward blocks of many experts: two grouped linear layers with an activation function between them, or three
with a gate, down(act(gate(x)) * up(x)); forward and backward each as one call.

Legend: E experts, M rows, H hidden size, I inner size. See `ds_core.grouped` for how rows lie, and for the order of
sums. The activation functions have an error of at most 2^-20 max(1, |x|), and are computed again in backward: for it,
(M, I) is kept, or twice that with a gate.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_core import _native, threads
from ds_core.large_pages import in_large_pages
from ds_core.operators import Operator, Operators

ACTIVATIONS = ("gelu", "relu", "silu")
"""In the order of their numbers in the native module. "gelu" is the one with the error function."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of all experts. A product without biases has None in place of them."""

    up: Tensor
    """(E, I, H)."""
    up_bias: Tensor | None
    """(E, I)."""
    gate: Tensor | None
    """(E, I, H); None: the activation is applied to `up` itself."""
    gate_bias: Tensor | None
    """(E, I)."""
    down: Tensor
    """(E, H, I)."""
    down_bias: Tensor | None
    """(E, H)."""


def forward(
    x: Tensor, weights: Weights, sizes: Sequence[int], activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (M, H), and what `backward` needs: the argument of the activation, (M, I), and its factor, (M, I) or
    None.

    Args:
        x: (M, H), for which `grouped.is_native` holds with all weights.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: tensors that do not fit.
    """
    w = weights
    out, argument, factor = _operators().call.grouped_feed_forward(
        x,
        *(w.up, w.up_bias, w.gate, w.gate_bias, w.down, w.down_bias),
        sizes,
        ACTIVATIONS.index(activation),
        _inner(x, w.up),
    )
    return out, argument, factor if w.gate is not None else None


def backward(
    grad: Tensor,
    x: Tensor,
    argument: Tensor,
    factor: Tensor | None,
    weights: tuple[Tensor, Tensor | None, Tensor],
    sizes: Sequence[int],
    activation: str,
) -> tuple[Tensor, list[Tensor]]:
    """Returns (M, H), the gradient of `x`, and the gradients of the weights and biases of up, gate (if there is one)
    and down, in this order.

    Args:
        grad: (M, H), the gradient of the output.
        argument, factor: what `forward` returned.
        weights: up, gate and down.
    """
    up, gate, down = weights
    scratch = [_inner(x, up) for _ in range(2 if gate is None else 3)]
    if gate is not None:
        scratch.append(torch.empty_like(x))
    of_x, *of_weights = _operators().call.grouped_feed_forward_grad(
        grad, x, argument, factor, up, gate, down, sizes, ACTIVATIONS.index(activation), scratch
    )
    return of_x, of_weights


@functools.cache
def _operators() -> Operators:
    """See `ds_core.operators`."""
    return Operators(
        {
            "grouped_feed_forward(Tensor x, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, Tensor down, "
            "Tensor? down_bias, int[] sizes, int activation, Tensor(a!) scratch) -> (Tensor, Tensor, Tensor)": Operator(
                _forward, _like_forward, lambda x, up, _, gate, *__: _macs(x, up, gate)
            ),
            "grouped_feed_forward_grad(Tensor grad, Tensor x, Tensor argument, Tensor? factor, Tensor up, "
            "Tensor? gate, Tensor down, int[] sizes, int activation, Tensor(a!)[] scratch) -> Tensor[]": Operator(
                _backward, _like_backward, lambda _, x, __, ___, up, gate, *____: 2 * _macs(x, up, gate)
            ),
        }
    )


def _macs(x: Tensor, up: Tensor, gate: Tensor | None) -> int:
    return x.numel() * up.shape[1] * (2 if gate is None else 3)


def _inner(x: Tensor, up: Tensor) -> Tensor:
    """A tensor (M, I). Those that kernels only need while they run are arguments of the operators, so that whatever
    counts allocations of operators, such as a plan, sees them.
    """
    return in_large_pages(x.new_empty(x.shape[0], up.shape[1]))


def _like_forward(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _inner(x, up), x.new_empty(0) if gate is None else _inner(x, up)


def _forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    sizes: Sequence[int],
    activation: int,
    scratch: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    out, argument, factor = _like_forward(x, up, up_bias, gate)
    inner = (argument, None if gate is None else factor, scratch)
    weights = (up, up_bias, gate, gate_bias, down, down_bias)
    _native.core.grouped_feed_forward(
        x, weights, sizes, up.shape[2], up.shape[1], activation, inner, out, threads.count()
    )
    return out, argument, factor


def _like_backward(
    grad: Tensor,
    x: Tensor,
    argument: Tensor,
    factor: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    *_: object,
) -> list[Tensor]:
    of_weights: list[Tensor] = []
    for weight in (up, gate, down):
        if weight is not None:
            of_weights += [in_large_pages(torch.empty_like(weight)), weight.new_empty(weight.shape[:2])]
    return [torch.empty_like(x), *of_weights]


def _backward(
    grad: Tensor,
    x: Tensor,
    argument: Tensor,
    factor: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    sizes: Sequence[int],
    activation: int,
    scratch: list[Tensor],
) -> list[Tensor]:
    results = _like_backward(grad, x, argument, factor, up, gate, down)
    of_x, *of_weights = results
    of_layers = (*of_weights[:2], None, None, *of_weights[2:]) if gate is None else tuple(of_weights)
    inner, of_argument = scratch[:2]
    of_factor, of_x_by_gate = (None, None) if gate is None else scratch[2:]
    _native.core.grouped_feed_forward_grad(
        grad,
        x,
        (up, None, gate, None, down, None),
        sizes,
        up.shape[2],
        up.shape[1],
        activation,
        (argument, factor, inner),
        (of_argument, of_factor, None),
        (of_x, of_x_by_gate),
        of_layers,
        threads.count(),
    )
    if of_x_by_gate is not None:
        of_x += of_x_by_gate
    return results
