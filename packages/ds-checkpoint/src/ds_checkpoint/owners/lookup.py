"""Which owner speaks for a model."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from ds_checkpoint.interfaces import RecordOwner

GROUP = "ds_checkpoint.owners"
"""Entry points of packages that own sharded state; each is a `Claim`."""

Claim = Callable[[nn.Module, Optimizer | None], RecordOwner | None]
"""From a model and its optimizer (None: the model alone) to what speaks for them, or None if they are not its own."""


def owner_of(
    model: nn.Module, optimizer: Optimizer | None, claims: Sequence[Claim] | None = None
) -> RecordOwner:
    """The first owner that claims the model, or else the model's own tensors, plain or DTensor.

    Args:
        claims: who is asked; default the entry points of packages that are imported already. A model can only be
            theirs if they are, and nothing is imported for a question.
    """
    for claim in _registered() if claims is None else claims:
        owner = claim(model, optimizer)
        if owner is not None:
            return owner
    from ds_checkpoint.owners.plain import (
        PlainOwner,
    )  # imports torch's DTensor, and with it sympy: half a second

    return PlainOwner(model, optimizer)


def _registered() -> Iterator[Claim]:
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.module.partition(".")[0] in sys.modules:
            yield entry.load()
