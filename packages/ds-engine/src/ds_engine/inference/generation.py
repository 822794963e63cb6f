"""Text from a model that is divided among ranks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

import ds_zero


def generate_of(module: nn.Module) -> Callable[..., Any]:
    """The module's own `generate`. Where its parameters are divided, every token is a gather in which all ranks take
    part: so a model of transformers gets `synced_gpus=True`, with which a rank that has finished goes on computing, and
    throws it away, until the last one has.

    Raises:
        AttributeError: the module has no `generate`.
    """
    own: Callable[..., Any] = module.generate  # type: ignore[assignment]
    if not is_divided(module):
        return own
    synced = dist.is_initialized() and dist.get_world_size() > 1
    synced = synced and "synced_gpus" in inspect.signature(own).parameters

    def generate(*args: Any, **kwargs: Any) -> Any:
        if synced and kwargs.get("synced_gpus") is None:
            kwargs["synced_gpus"] = True
        with warnings.catch_warnings():
            # An encoder runs once, and a decoder once for each token: to generate is to run modules in another order.
            warnings.filterwarnings("ignore", message="modules run in another order")
            return own(*args, **kwargs)

    return generate


def is_divided(module: nn.Module) -> bool:
    """Whether its parameters are gathered while it runs (stage 3)."""
    found = (ds_zero.presence(p) for p in module.parameters())
    return any(p is not None and p.divided for p in found)
