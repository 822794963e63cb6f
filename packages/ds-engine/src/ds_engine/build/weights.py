"""Loads stored weights into a model; no rank holds more than one whole module."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn

import ds_zero
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.read.weights import Weights, open_weights
from ds_checkpoint.team import Team

__all__ = ["Weights", "fill", "open_weights"]


def fill(model: nn.Module, weights: Weights) -> int:
    """Loads stored values into the parameters and persistent buffers of a model, in its own dtypes, module by module.
    Collective if the model is sharded; then only rank 0 reads the sharded parameters.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: on every rank, if values are missing, have another shape, or cannot be read.
    """
    team, done, missing = Team(), set[int](), []
    error: Exception | None = None
    known: set[str] = set()
    for prefix, module in model.named_modules():
        own = {
            f"{prefix}.{name}" if prefix else name: tensor
            for name, tensor in (*module.named_parameters(recurse=False), *_persistent(module))
        }
        known |= own.keys()
        named = {name: tensor for name, tensor in own.items() if name in weights and id(tensor) not in done}
        missing += [(name, id(tensor)) for name, tensor in own.items() if name not in weights]
        done |= {id(tensor) for tensor in named.values()}
        divided = [t for t in named.values() if isinstance(t, nn.Parameter) and _is_sharded(t)]
        with ds_zero.gathered(divided, write=True) if divided else contextlib.nullcontext(), torch.no_grad():
            for name, tensor in named.items():
                if divided and isinstance(tensor, nn.Parameter) and not team.first:
                    continue
                try:
                    error = error or _copy(name, tensor, weights[name]())
                except (OSError, RuntimeError, CheckpointError) as raised:
                    error = error or raised
    lacking = sorted(name for name, number in missing if number not in done)
    if lacking and error is None:
        total = len(done) + len(lacking)
        error = CheckpointError(
            f"{len(done)} of {total} tensors of the model are among the stored weights; missing: {_some(lacking)}"
        )
    team.settle(error, "loading weights")
    if extra := sorted(set(weights) - known):
        warnings.warn(f"{len(extra)} stored tensors are not in the model: {_some(extra)}", stacklevel=2)
    return len(done)


def _copy(name: str, tensor: Tensor, value: Tensor) -> CheckpointError | None:
    if value.shape != tensor.shape:
        return CheckpointError(
            f"{name} is stored as {tuple(value.shape)}, but the model has {tuple(tensor.shape)}"
        )
    tensor.copy_(value)
    return None


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    left_out = module._non_persistent_buffers_set
    return [(name, b) for name, b in module.named_buffers(recurse=False) if name not in left_out]


def _is_sharded(param: nn.Parameter) -> bool:
    return ds_zero.presence(param) is not None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
