"""Model-parallel models: one checkpoint contains the part of each model-parallel rank.

Ranks of different parts have different tensors, and often different parameters, under the same names. So records get
the part's coordinates, and what is said of parameters by name is kept for each part. A job that reads has to be cut in
the same way; how many data-parallel ranks it has does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format.coordinates import merged, sizes
from ds_checkpoint.format.records import Record
from ds_checkpoint.interfaces import Coordinates

if TYPE_CHECKING:
    from ds_checkpoint.interfaces import ShardRecord
    from ds_checkpoint.read.checkpoint import Checkpoint

MODEL_AXES = "model_axes"
"""Key, in a manifest's values, of the axes along which the model was cut: name -> size."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """What one rank holds of a model; a model that is whole has no coordinates."""

    coordinates: Coordinates = field(default_factory=dict)
    """Along the axes of more than one rank that cut the model, outermost first."""

    @property
    def index(self) -> int:
        """Number of this part among all."""
        number = 0
        for index, size in self.coordinates.values():
            number = number * size + index
        return number

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the axes, which a manifest stores as the value `MODEL_AXES`."""
        return sizes(self.coordinates)

    @property
    def key(self) -> str:
        """Key of this part's values in a manifest."""
        return f"part/{self.index}"

    def placed(self, records: Iterable[ShardRecord]) -> list[ShardRecord]:
        """Returns the records with the coordinates of this part added."""
        if not self.coordinates:
            return list(records)
        return [
            Record(
                r.fqn, r.state, r.global_shape, r.flat_offset, r.data, merged(r.coordinates, self.coordinates)
            )
            for r in records
        ]

    def narrow(self, checkpoint: Checkpoint) -> None:
        """Restricts `checkpoint` to the tensors and values of this part.

        Raises:
            CheckpointError: it was written by a model that was split into other parts.
        """
        values = checkpoint.manifest.values
        written: Mapping[str, int] = values.get(MODEL_AXES) or {}
        for axis in (*written, *self.axes):
            there, here = written.get(axis, 1), self.axes.get(axis, 1)
            if there != here:
                raise CheckpointError(
                    f"it was written by a model that is cut into {there} along the axis {axis!r}, this one is cut into "
                    f"{here}: load it with the same size of that axis (the number of data-parallel ranks may differ)"
                )
        if self.coordinates:
            own: Mapping[str, Any] = values[self.key]
            checkpoint.narrow(self.coordinates, {**values, **own})


def refuse_parts(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a checkpoint with several parts, which cannot be joined without the model's code."""
    axes = checkpoint.manifest.values.get(MODEL_AXES)
    if axes:
        cut = " x ".join(f"{axis} {size}" for axis, size in axes.items())
        raise CheckpointError(
            f"{checkpoint.path} holds the parts of a model that is cut among ranks ({cut}), and only the model knows "
            "how they make a whole: load it into an engine on as many, and put the parts together there"
        )
