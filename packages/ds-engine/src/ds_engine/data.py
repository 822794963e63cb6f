"""The loader that `initialize(training_data=...)` returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler


class Loader:
    """Micro-batches of this rank's share of a data set; each pass over it is shuffled anew, the same way on
    every rank.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        seed: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        pin_memory: bool,
        drop_last: bool = True,
    ) -> None:
        self.epoch = 0
        """Passes that were started."""
        self.sampler: DistributedSampler[Any] | None = None
        if isinstance(dataset, IterableDataset):
            if ranks > 1:
                warnings.warn(
                    "training_data is an IterableDataset, which has to give each rank its own samples "
                    "itself: it is used as it is",
                    stacklevel=4,
                )
        else:
            self.sampler = DistributedSampler(dataset, num_replicas=ranks, rank=rank, shuffle=True, seed=seed)
        # A last micro-batch that is smaller than the others weighs its samples more.
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=micro_batch,
            sampler=self.sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        if self.sampler is not None and len(self.loader) == 0:
            raise ValueError(
                f"training_data has {len(dataset)} samples, {len(self.sampler)} for each of {ranks} ranks: fewer than "  # type: ignore[arg-type]
                f"one micro-batch of {micro_batch}, so the loader would be empty; lower train_micro_batch_size_per_gpu"
            )

    def __iter__(self) -> Iterator[Any]:
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)

    def __len__(self) -> int:
        """Micro-batches in one pass on this rank."""
        return len(self.loader)
