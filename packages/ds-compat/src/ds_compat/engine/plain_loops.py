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
    """ds_zero's error, which is also an AssertionError, as in DeepSpeed."""


@contextlib.contextmanager
def raising_assertion_error() -> Iterator[None]:
    """Context manager that raises UnusedParametersError instead of ds_zero's UnusedParameterError."""
    try:
        yield
    except ds_zero.UnusedParameterError as error:
        raise UnusedParametersError(*error.args) from error


def scale_gradients(output: Any, factor: Callable[[], float]) -> None:
    """Multiplies the gradients of tensors in `output` by `factor()`, which is called when a gradient arrives."""

    def hook(grad: Tensor) -> Tensor:
        by = factor()
        return grad if by == 1.0 else grad * by

    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
            leaf.register_hook(hook)


@torch.no_grad()
def take_gradients(module: nn.Module, scale: float) -> None:
    """Makes the next step use gradients that the user has assigned to parameters of a stage-0 model, instead of
    computing them by backward.

    Gradients that backward has shown in `param.grad`, and their replacements, are used by ds_zero already. Rank 0's
    values are used on all ranks. Collective if there are such gradients, so every rank must assign them to the same
    parameters. Gradients of parameters that are not in the optimizer are dropped.

    Args:
        scale: the loss scale with which the gradients were computed.
    """
    for param in ds_zero.foreign_gradients(module):
        if not param.requires_grad or param.grad is None:
            continue
        grad, param.grad = param.grad.float() / scale, None
        held = ds_zero.presence(param)
        if held is not None and held.trained:
            ds_zero.set_full(None, param, "grad", grad)
