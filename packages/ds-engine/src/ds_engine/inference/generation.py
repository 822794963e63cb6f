"""Text generation with a sharded model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn


def generate_of(module: nn.Module, *, divided: bool) -> Callable[..., Any]:
    """Returns the module's own `generate`.

    If its parameters are sharded (`divided`), every token needs gathers, in which all ranks must take part. A
    transformers model then gets `synced_gpus=True`: a rank that has finished continues to run forward, and drops the
    result, until the last rank has finished.

    Raises:
        AttributeError: the module has no `generate`.
    """
    own: Callable[..., Any] = module.generate  # type: ignore[assignment]
    if not divided:
        return own
    synced = dist.is_initialized() and dist.get_world_size() > 1
    synced = synced and "synced_gpus" in inspect.signature(own).parameters

    def generate(*args: Any, **kwargs: Any) -> Any:
        if synced and kwargs.get("synced_gpus") is None:
            kwargs["synced_gpus"] = True
        with warnings.catch_warnings():
            # In generation modules run in another order than in training: an encoder once, a decoder once for each
            # token.
            warnings.filterwarnings("ignore", message="modules ran in another order")
            return own(*args, **kwargs)

    return generate
