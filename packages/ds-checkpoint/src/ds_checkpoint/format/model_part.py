"""A model that is itself cut among ranks: the part of each model-parallel rank in one checkpoint.

Ranks of different parts have different tensors, and often different parameters, under the same names. So names get
the part's coordinate as a suffix, and what is said of parameters by name is kept for each part. A job that reads has
to be cut in the same way; how many data-parallel ranks it has does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format.records import Record

if TYPE_CHECKING:
    from ds_checkpoint.interfaces import ShardRecord
    from ds_checkpoint.read.checkpoint import Checkpoint

PARTS = "model_parallel_size"
"""Key of the number of parts in a manifest's values."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """Part `index` of `count`; a model that is whole is part 0 of 1 and has plain names."""

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        return f"#part{self.index}of{self.count}" if self.count > 1 else ""

    @property
    def key(self) -> str:
        """Under which a manifest's values have what is this part's own."""
        return f"part/{self.index}"

    def named(self, records: Iterable[ShardRecord]) -> list[ShardRecord]:
        """The records under names that are theirs alone."""
        if self.count == 1:
            return list(records)
        return [Record(r.fqn + self.suffix, r.state, r.global_shape, r.flat_offset, r.data) for r in records]

    def narrow(self, checkpoint: Checkpoint) -> None:
        """Let `checkpoint` show the tensors and values of this part under the names that the model has.

        Raises:
            CheckpointError: it was written by a model that is cut into another number of parts.
        """
        values = checkpoint.manifest.values
        written = int(values.get(PARTS, 1))
        if written != self.count:
            raise CheckpointError(
                f"it was written by a model cut among {written} model-parallel ranks, this one has {self.count}: load "
                "it with the same number (the number of data-parallel ranks may differ)"
            )
        if self.count > 1:
            own: Mapping[str, Any] = values[self.key]
            checkpoint.show(
                {fqn.removesuffix(self.suffix): fqn for fqn in self._mine(checkpoint)}, {**values, **own}
            )

    def _mine(self, checkpoint: Checkpoint) -> list[str]:
        return [fqn for fqn in checkpoint.manifest.tensors if fqn.endswith(self.suffix)]


def refuse_parts(checkpoint: Checkpoint) -> None:
    """CheckpointError for a checkpoint that no single rank's model can hold."""
    count = int(checkpoint.manifest.values.get(PARTS, 1))
    if count > 1:
        raise CheckpointError(
            f"{checkpoint.path} holds the parts of {count} model-parallel ranks, and only the model knows how they "
            "make a whole: load it into an engine on as many, and put the parts together there"
        )
