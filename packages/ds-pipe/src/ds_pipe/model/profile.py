"""Measures the layers of a model, for a partition by time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe.executor.values import as_leaves, take_apart
from ds_pipe.model.layer_specs import Layer, LayerSpec, TiedLayerSpec


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Costs of every layer; `PipelineModule(partition_method=profile)` divides by them."""

    seconds: tuple[float, ...]
    """Seconds of forward and backward of every layer."""
    parameter_bytes: tuple[int, ...]
    """Bytes of the parameters of every layer."""
    limit_bytes: float = float("inf")
    """No stage may have more bytes of parameters."""


def profile_layers(
    layers: Sequence[Layer],
    sample: Any,
    *,
    repeats: int = 3,
    limit_bytes: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> LayerProfile:
    """Runs one layer after the other, of which only one exists at a time, and measures each.

    Ranks measure different times: broadcast the result of one rank before it divides a model.

    Args:
        layers: the layers, as for `PipelineModule`.
        sample: the input of one micro-batch.
        repeats: how often each is measured; the fastest counts.
        limit_bytes: see `LayerProfile`.
        clock: returns seconds.
    """
    seconds, sizes = [], []
    value = sample
    for layer in layers:
        module = layer.build() if isinstance(layer, LayerSpec) else layer
        forward_fn = layer.forward_fn if isinstance(layer, TiedLayerSpec) else None
        times = []
        for _ in range(repeats):
            start = clock()
            given, _ = as_leaves(value)
            output = module(given) if forward_fn is None else forward_fn(module, given)
            needed = [t for t in take_apart(output)[1] if t.requires_grad]
            if needed:
                torch.autograd.backward(needed, [torch.ones_like(t) for t in needed])
            times.append(clock() - start)
        seconds.append(min(times))
        params: list[Tensor] = list(module.parameters()) if isinstance(module, nn.Module) else []
        sizes.append(sum(p.numel() * p.element_size() for p in params))
        for p in params:
            p.grad = None
        value, _ = as_leaves(output)
    return LayerProfile(seconds=tuple(seconds), parameter_bytes=tuple(sizes), limit_bytes=limit_bytes)
