"""Layers that process a random subset of the tokens.

[Note: skipped tokens]
In training, a layer processes `kept` of the S tokens of every sequence. They are drawn anew for each sequence, layer
and call, and keep their order. The other tokens skip the layer: they are not changed. The layer's outputs replace the
kept tokens in the sequence, so the layers before and after receive whole sequences. Masks and positions are restricted
to the kept tokens, so a causal mask stays causal.

This is implemented by forward hooks. No module is replaced, so names of parameters and checkpoints stay the same.

Source: Yao et al., Random-LTD: Random and Layerwise Token Dropping (2022), section 3.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, kw_only=True)
class DroppingConfig:
    """The layout of a layer's arguments. The first argument, and the result or its first element, must be hidden
    states.
    """

    batch_first: bool = True
    """Whether hidden states have shape (batch, tokens, ...) or (tokens, batch, ...)."""
    mask: str | None = None
    """Name of the argument with the attention mask, whose last dim, or last two dims, are tokens."""
    along: tuple[str, ...] = ("position_ids", "position_embeddings")
    """Names of further arguments with one entry per token: tensors, or tuples of tensors, whose dim 1 is tokens (dim 0:
    batch, or 1). Names that a call does not have are ignored."""


class TokenDropping:
    """In training, lets each of `layers` process only `kept` random tokens of every sequence; the others skip it.

    It works through hooks, until `remove`. Set `kept` at any time; None means all tokens. [Note: skipped tokens]
    """

    def __init__(self, layers: Sequence[nn.Module], config: DroppingConfig | None = None) -> None:
        """Raises ValueError if `layers` is empty."""
        if not layers:
            raise ValueError("TokenDropping needs at least one layer")
        self.config = config or DroppingConfig()
        self.kept: int | None = None
        """Number of tokens per sequence that a layer processes. None: all of them."""
        self._open: dict[int, list[tuple[Tensor, Tensor] | None]] = {id(layer): [] for layer in layers}
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        """Removes the hooks: the layers process all tokens again."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        names = list(inspect.signature(layer.forward).parameters)
        hidden = args[0] if args else kwargs[names[0]]
        tokens = hidden.shape[1 if self.config.batch_first else 0]
        if not layer.training or self.kept is None or self.kept >= tokens:
            self._open[id(layer)].append(None)
            return None
        index = self._draw(hidden, self.kept)
        self._open[id(layer)].append((hidden, index))
        given = dict(kwargs)
        arguments = list(args)
        if args:
            arguments[0] = self._take(hidden, index)
        else:
            given[names[0]] = self._take(hidden, index)
        for place, name in enumerate(names[: len(args)]):
            arguments[place] = self._fit(name, arguments[place], index, tokens) if place else arguments[place]
        given = {name: self._fit(name, value, index, tokens) for name, value in given.items()}
        return tuple(arguments), given

    def _draw(self, hidden: Tensor, kept: int) -> Tensor:
        """Draws the indices of the kept tokens: shape (batch, kept), ascending."""
        batch, tokens = hidden.shape[:2] if self.config.batch_first else hidden.shape[1::-1]
        order = torch.rand(batch, tokens, device=hidden.device).argsort(1)
        return order[:, :kept].sort(1).values

    def _take(self, hidden: Tensor, index: Tensor) -> Tensor:
        return hidden.gather(1 if self.config.batch_first else 0, self._wide(hidden, index))

    def _wide(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Expands `index` to the shape of the kept hidden states."""
        place = index if self.config.batch_first else index.t()
        rest = hidden.shape[2:]
        return place.view(*place.shape, *[1] * len(rest)).expand(*place.shape, *rest)

    def _fit(self, name: str, value: Any, index: Tensor, tokens: int) -> Any:
        """Restricts an argument to the kept tokens."""
        if name == self.config.mask and isinstance(value, Tensor):
            return _mask_of(value, index, tokens)
        if name in self.config.along:
            if isinstance(value, (tuple, list)):
                return type(value)(_along(part, index, tokens) for part in value)
            return _along(value, index, tokens)
        return value

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        passed = self._open[id(layer)].pop() if self._open[id(layer)] else None
        if passed is None or (output is None and sys.exc_info()[0] is not None):
            return None
        hidden, index = passed
        part = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(part, Tensor):
            raise ValueError(
                f"{type(layer).__name__} returns {type(part).__name__}: to drop tokens, it must return a tensor, or a "
                "tuple whose first element is a tensor"
            )
        dim = 1 if self.config.batch_first else 0
        whole = hidden.to(part.dtype).scatter(dim, self._wide(part, index), part)
        if isinstance(output, (tuple, list)):
            return type(output)((whole, *output[1:]))
        return whole


def _along(value: Any, index: Tensor, tokens: int) -> Any:
    """Selects the kept tokens along dim 1."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != tokens:
        return value
    value = value.expand(index.shape[0], *value.shape[1:])
    wide = index.view(*index.shape, *[1] * (value.dim() - 2))
    return value.gather(1, wide.expand(*index.shape, *value.shape[2:]))


def _mask_of(mask: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Restricts the mask to the kept tokens: along the last dim, and along the one before if that is tokens, too."""
    batch, kept = index.shape
    if mask.shape[-1] != tokens:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, but sequences have {tokens} tokens: its last dim must be the "
            "number of tokens"
        )
    if mask.dim() == 2 and mask.shape[0] == batch == tokens:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, which is ambiguous: (batch, tokens) or (tokens, tokens). "
            "Pass it as (batch, 1, 1, tokens) or (1, 1, tokens, tokens)"
        )
    if mask.dim() == 2 and mask.shape[0] != tokens:  # (batch or 1, tokens)
        return mask.expand(batch, tokens).gather(1, index)
    square = mask.dim() >= 2 and mask.shape[-2] == tokens
    while mask.dim() < 4:  # (batch, heads, rows, tokens); a square mask is the same for all sequences
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask.unsqueeze(1)
    mask = mask.expand(batch, *mask.shape[1:])
    place = index.view(batch, 1, 1, kept).expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, place)
    if square:
        place = index.view(batch, 1, kept, 1).expand(-1, mask.shape[1], -1, kept)
        mask = mask.gather(2, place)
    return mask
