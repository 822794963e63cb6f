"""The cuts of parameters, by identity: so that a sharder and a checkpoint find them without an attribute on a
parameter. It is never iterated.
"""

from __future__ import annotations

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ds_layers.tensor.cut import Cut

_cuts = WeakIdKeyDictionary()


def note(param: nn.Parameter, cut: Cut) -> None:
    """Records that `param` is a part of a tensor."""
    _cuts[param] = cut


def cut_of(fqn: str, param: nn.Parameter) -> Cut | None:
    """Returns the cut of a parameter; None if this rank holds all of it. `fqn` is not used: this is the signature of
    `ds_zero.ModelParallel.part_of`.
    """
    cut: Cut | None = _cuts.get(param)
    return cut
