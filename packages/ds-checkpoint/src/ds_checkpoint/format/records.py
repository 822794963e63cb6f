"""Records: ranges of logical tensors, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ds_checkpoint.interfaces import Coordinates, StoredTensor

PARAM, BUFFER = "param", "buffer"
"""States of the model itself; every other state belongs to the optimizer."""


def in_memory(data: Tensor | StoredTensor) -> Tensor:
    """Returns the values, loaded if they are not in memory."""
    return data if isinstance(data, Tensor) else data.load()


@dataclass(frozen=True)
class Record:
    """Elements [flat_offset, flat_offset + data.numel()) of one flattened logical tensor."""

    fqn: str
    """Name of the parameter or buffer."""
    state: str
    """"param", "buffer", or the name of an optimizer state."""
    global_shape: tuple[int, ...]
    flat_offset: int
    data: Tensor | StoredTensor
    """1-D and contiguous."""
    coordinates: Coordinates = field(default_factory=dict)
