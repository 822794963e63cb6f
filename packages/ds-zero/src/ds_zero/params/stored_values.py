"""Values of records that are not in memory: they are loaded when a checkpoint is written, one bucket at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.optimizer_states import states_opened


class StoredTensor:
    """A 1-D tensor whose values are loaded by `load`."""

    def __init__(self, numel: int, dtype: torch.dtype, load: Callable[[], Tensor]) -> None:
        self.dtype = dtype
        self._numel, self._load = numel, load

    def numel(self) -> int:
        """Returns the number of elements."""
        return self._numel

    def element_size(self) -> int:
        """Returns the bytes of one element."""
        return self.dtype.itemsize

    def load(self) -> Tensor:
        """Returns the values, which may be a view of a buffer that the next `load` of another tensor replaces."""
        return self._load()


class BucketReader:
    """Loads what is away of one bucket after the other. Records of a model share one, and have the order of the
    buckets, so that everything is loaded once.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._bucket: Bucket | None = None
        self._values: Tensor | None = None
        self._states: list[dict[str, Tensor]] = []

    def values(self, bucket: Bucket) -> Tensor:
        """Returns a copy of the authoritative values of the owned range."""
        self._turn_to(bucket)
        if self._values is None:
            with bucket.storage.opened(bucket.storage.exact) as values:
                self._values = values.detach().clone()
        return self._values

    def state(self, bucket: Bucket, index: int, name: str) -> Tensor:
        """Returns an element-wise optimizer state of one shard."""
        return self.states(bucket)[index][name]

    def states(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        """Returns the states of each shard."""
        self._turn_to(bucket)
        if not self._states:
            assert self._optimizer is not None
            with states_opened(self._optimizer, bucket.shards):
                self._states = [dict(self._optimizer.state.get(shard, {})) for shard in bucket.shards]
        return self._states

    def _turn_to(self, bucket: Bucket) -> None:
        if self._bucket is not bucket:
            self._bucket, self._values, self._states = bucket, None, []
