"""The loader that `initialize(training_data=...)` returns, and the order in which ranks see samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


class MicroBatches:
    """Indices of this rank's micro-batches in one pass, from any sample of it on.

    The shuffled pass is cut into micro-batches, and those are dealt round: rank r of W has number k W + r of
    them. So a step over so many samples sees the same samples on any number of ranks, and a pass that stopped at
    a sample goes on there on another number of ranks. What is left at the end, less than one micro-batch for
    each rank, is dropped, or shared out with a few samples taken twice.
    """

    def __init__(
        self, num_samples: int, *, micro_batch: int, rank: int, ranks: int, seed: int, drop_last: bool
    ) -> None:
        self.num_samples, self.micro_batch = num_samples, micro_batch
        self.rank, self.ranks, self.seed, self.drop_last = rank, ranks, seed, drop_last
        self.epoch = 0
        self.start = 0
        """Samples of this pass that were seen before, on all ranks together."""

    def __len__(self) -> int:
        """Micro-batches that are left of the pass on this rank."""
        whole, rest = divmod(self.num_samples - self.start, self.micro_batch * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()[self.start :]
        together = self.micro_batch * self.ranks
        whole = len(order) // together * together
        for first in range(self.rank * self.micro_batch, whole, together):
            yield order[first : first + self.micro_batch]
        rest = order[whole:]
        if rest and not self.drop_last:
            each = -(-len(rest) // self.ranks)
            share = [rest[i % len(rest)] for i in range(self.rank * each, (self.rank + 1) * each)]
            yield share

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order


class Loader:
    """Micro-batches of this rank's share of a data set; each pass over it is shuffled anew, the same way on
    every rank. Its position is part of a checkpoint, and is found again on any number of ranks.
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
        self._seen = 0
        """Samples of the present pass that all ranks have been given."""
        self._resumed = False
        self.sampler: MicroBatches | None = None
        options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory}
        if isinstance(dataset, IterableDataset):
            if ranks > 1:
                warnings.warn(
                    "training_data is an IterableDataset, which has to give each rank its own samples "
                    "itself: it is used as it is, and its position is not in checkpoints",
                    stacklevel=4,
                )
            options |= {"batch_size": micro_batch, "drop_last": drop_last}
        else:
            num_samples = len(dataset)  # type: ignore[arg-type]
            self.sampler = MicroBatches(
                num_samples, micro_batch=micro_batch, rank=rank, ranks=ranks, seed=seed, drop_last=drop_last
            )
            options["batch_sampler"] = self.sampler
            if len(self.sampler) == 0:
                raise ValueError(
                    f"training_data has {num_samples} samples, fewer than one micro-batch of {micro_batch} for each of "
                    f"{ranks} ranks, so the loader would be empty; lower train_micro_batch_size_per_gpu"
                )
        self.loader: DataLoader[Any] = DataLoader(dataset, **options)

    def __iter__(self) -> Iterator[Any]:
        """A new pass; the first one after `load_state_dict` begins where that one stood."""
        if self._resumed:
            self._resumed = False
        else:
            self.epoch += 1
            self._seen = 0
        if self.sampler is None:
            return iter(self.loader)
        self.sampler.epoch = self.epoch - 1
        self.sampler.start = self._seen
        return self._counted(self.sampler)

    def _counted(self, sampler: MicroBatches) -> Iterator[Any]:
        epoch = self.epoch
        for batch in self.loader:
            if self.epoch == epoch:  # of several passes under way the youngest one counts
                together = sampler.micro_batch * sampler.ranks
                self._seen = min(self._seen + together, sampler.num_samples)
            yield batch

    def __len__(self) -> int:
        """Micro-batches in one whole pass on this rank."""
        if self.sampler is None:
            return len(self.loader)
        start, self.sampler.start = self.sampler.start, 0
        try:
            return len(self.sampler)
        finally:
            self.sampler.start = start

    def state_dict(self) -> dict[str, Any]:
        """Where the present pass stands: the same on all ranks."""
        samples = self.sampler.num_samples if self.sampler is not None else None
        seed = self.sampler.seed if self.sampler is not None else None
        return {"epoch": self.epoch, "seen": self._seen, "num_samples": samples, "seed": seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks and with any micro-batch size.

        Raises:
            ValueError: it belongs to a data set of another size.
        """
        here = self.sampler.num_samples if self.sampler is not None else None
        if state["num_samples"] != here:
            raise ValueError(
                f"the position belongs to training_data of {state['num_samples']} samples, here are {here}: "
                "samples would be left out or seen twice; use the same data, or load without the loader's position"
            )
        if self.sampler is not None:
            self.sampler.seed = state["seed"]  # or the pass would be another permutation
        self.epoch, self._seen = state["epoch"], state["seen"]
        self._resumed = self.sampler is not None and self.epoch > 0 and self._left() > 0

    def _left(self) -> int:
        assert self.sampler is not None
        self.sampler.start = self._seen
        return len(self.sampler)
