"""Finds the owner of a model."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from ds_checkpoint.interfaces import RecordOwner

GROUP = "ds_checkpoint.owners"
"""Entry point group of packages that own sharded state; each entry is a `Claim`."""

Claim = Callable[[nn.Module, Optimizer | None], RecordOwner | None]
"""A function from a model and its optimizer (None: the model alone) to their owner, or None if the package does not
own them.
"""


def owner_of(
    model: nn.Module, optimizer: Optimizer | None, claims: Sequence[Claim] | None = None
) -> RecordOwner:
    """Returns the first owner that claims the model, or else a `PlainOwner` for plain tensors and DTensors.

    Args:
        claims: functions to try. Default: the entry points of packages that are imported already. A package that is
            not imported cannot own the model, and none is imported here.
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
