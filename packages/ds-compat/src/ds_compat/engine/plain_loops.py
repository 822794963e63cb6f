"""Support for loops that call `loss.backward()` directly, or assign gradients to parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ds_zero


class UnusedParametersError(ds_zero.UnusedParameterError, AssertionError):
    """As ds_zero's; code that expects the original's finds an AssertionError."""


@contextlib.contextmanager
def unused_told() -> Iterator[None]:
    """Parameters without a gradient are UnusedParametersError inside."""
    try:
        yield
    except ds_zero.UnusedParameterError as error:
        raise UnusedParametersError(*error.args) from error


def scale_gradients(output: Any, factor: Callable[[], float]) -> None:
    """Multiply gradients that come into `output`'s tensors by `factor()`, asked when they come."""

    def hook(grad: Tensor) -> Tensor:
        by = factor()
        return grad if by == 1.0 else grad * by

    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
            leaf.register_hook(hook)


@torch.no_grad()
def take_gradients(module: nn.Module, scale: float) -> None:
    """Make gradients that somebody has put on the parameters of a stage-0 model those of the step that follows.

    What backward shows there, and what has taken its place, ds_zero uses by itself; anything else was put there. Rank
    0's values count; collective where there are some, so every rank has to put them on the same parameters.

    Gradients of parameters that no group of the optimizer holds are dropped, as nothing is trained with them.

    Args:
        scale: the loss scale that they carry.
    """
    for param in ds_zero.foreign_gradients(module):
        if not param.requires_grad or param.grad is None:
            continue
        grad, param.grad = param.grad.float() / scale, None
        held = ds_zero.presence(param)
        if held is not None and held.trained:
            ds_zero.set_full(None, param, "grad", grad)
