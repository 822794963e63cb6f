"""Single parameters of which tensor-parallel ranks keep parts, for modules that compute with parts by themselves."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ds_layers.tensor import _registry
from ds_layers.tensor.cut import Cut


def keep_part(
    param: nn.Parameter,
    group: dist.ProcessGroup,
    dim: int,
    *,
    sections: int = 1,
    whole_length: int | None = None,
) -> None:
    """Keeps this rank's part of a parameter of which all ranks of the group have all values.

    Args:
        dim: the dimension that is cut.
        sections: number of equal sections of the dimension that are each cut.
        whole_length: length of the first dimension of the logical tensor, of which `param` is a run that other ranks
            continue: stacked experts. None: that of `param`.

    Raises:
        ValueError: sizes that the ranks do not divide.
    """
    here = {"dim": dim, "index": group.rank(), "size": group.size(), "blocks": sections}
    shape = tuple(param.shape)
    cut = Cut(shape=shape, **here)
    param.data = cut.of(param.detach())
    _registry.note(param, cut if whole_length is None else Cut(shape=(whole_length, *shape[1:]), **here))
