"""The loader that `initialize(training_data=...)` returns, and the order of its samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ds_engine.sampling.curriculum import CurriculumOrder, Difficulty
from ds_engine.sampling.order import Order


class MicroBatches:
    """The default order: the indices of this rank's micro-batches in one epoch, from any sample on.

    The shuffled epoch is divided into micro-batches, which are assigned round-robin: rank r of W gets the
    micro-batches k W + r. So a step with the same number of samples has the same samples on any number of ranks, and
    an epoch can continue on another number of ranks. The rest of the epoch, less than one micro-batch per rank, is
    dropped, or divided among the ranks with some samples repeated.
    """

    def __init__(
        self, num_samples: int, *, micro_batch: int, rank: int, ranks: int, seed: int, drop_last: bool
    ) -> None:
        self.num_samples, self.micro_batch = num_samples, micro_batch
        self.rank, self.ranks, self.seed, self.drop_last = rank, ranks, seed, drop_last
        self.epoch = 0
        self.start = 0
        """Number of samples of this epoch that all ranks together have already processed."""

    goes_on = False

    @property
    def together(self) -> int:
        return self.micro_batch * self.ranks

    @property
    def total(self) -> int:
        return self.num_samples

    def __len__(self) -> int:
        """Number of remaining micro-batches of the epoch on this rank."""
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

    def samples_at(self, position: int) -> None:
        """Returns None: the number of samples of a step is the configured one."""

    def told(self, position: int) -> Mapping[str, Any]:
        return {}

    def passed(self, position: int) -> None:
        """Does nothing: this order keeps no history."""

    def state_dict(self, position: int) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "order" in state:
            raise ValueError(f"samples were drawn in the order {state['order']!r}, but are shuffled here")
        self.seed = state["seed"]  # otherwise the epoch would be another permutation

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order


class Loader:
    """Yields this rank's micro-batches of a data set. Each epoch is shuffled anew, with the same permutation on every
    rank. Checkpoints contain its position, which can be restored on any number of ranks.
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
        order: Order | None = None,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            order: makes the order of samples; None: `MicroBatches`.
            num_workers: number of worker processes that load samples; 0: this process loads them.
        """
        self.epoch = 0
        """Number of epochs that were started."""
        self._seen = 0
        """Number of units of this epoch that all ranks together have got: samples, or the unit of the order."""
        self._resumed = False
        self.sampler: Order | None = order
        self.fixed = order is not None
        """Whether the order depends on the batch sizes, which therefore must not change."""
        self.post_process_func: Callable[[Any, Mapping[str, Any]], Any] | None = None
        """Called with every micro-batch and the information of the order about it (`current_difficulties`); returns
        the micro-batch to use.
        """
        # Without a generator of its own, a new iterator would draw from torch's global one, so that a job that resumes
        # in the middle of an epoch would get other random numbers (dropout) than one that was never interrupted.
        self._worker_seeds = torch.Generator()
        self._seed = seed + rank
        options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory}
        options["generator"] = self._worker_seeds
        options["num_workers"] = num_workers
        if isinstance(dataset, IterableDataset):
            if ranks > 1:
                warnings.warn(
                    "training_data is an IterableDataset, which must divide its samples among the ranks itself: "
                    "it is used unchanged, and checkpoints do not contain its position",
                    stacklevel=4,
                )
            options |= {"batch_size": micro_batch, "drop_last": drop_last}
        elif order is not None:
            options["batch_sampler"] = order
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
        """Starts a new epoch; the first one after `load_state_dict` starts at the restored position."""
        goes_on = self.sampler is not None and self.sampler.goes_on and self.epoch > 0
        if not self._resumed and not goes_on:
            self.epoch += 1
            self._seen = 0
        self._resumed = False
        self._worker_seeds.manual_seed((self._seed << 32) + self.epoch)
        if self.sampler is None:
            return self._told(iter(self.loader))
        self.sampler.epoch = self.epoch - 1
        self.sampler.start = self._seen
        return self._counted(self.sampler)

    def _counted(self, sampler: Order) -> Iterator[Any]:
        epoch, place = self.epoch, self._seen
        for batch in self.loader:
            told = sampler.told(place) if self.post_process_func is not None else {}
            place = min(place + sampler.together, sampler.total)
            if self.epoch == epoch:  # of several iterators, the latest one determines the position
                self._seen = place
                sampler.passed(place)
            yield batch if self.post_process_func is None else self.post_process_func(batch, told)

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch if self.post_process_func is None else self.post_process_func(batch, {})

    def samples(self) -> int | None:
        """Number of samples, over all ranks, of the optimizer step of the last micro-batch; None: the configured
        number.
        """
        return None if self.sampler is None else self.sampler.samples_at(max(0, self._seen - 1))

    def set_difficulties(self, functions: Mapping[str, Difficulty]) -> None:
        """Sets the schedules of measures with `"schedule_type": "custom"` in
        `data_efficiency.data_sampling.curriculum_learning`.

        Args:
            functions: name of a measure -> function from the step, counted from 1, to the difficulty.

        Raises:
            ValueError: the section is not enabled, or there is no such measure.
        """
        if not isinstance(self.sampler, CurriculumOrder):
            raise ValueError(
                "data_efficiency.data_sampling.curriculum_learning is not enabled: set its key "
                "enabled, and those of the sections around it, to true"
            )
        self.sampler.set_difficulties(functions)

    def __len__(self) -> int:
        """Number of micro-batches in a whole epoch on this rank."""
        if self.sampler is None:
            return len(self.loader)
        start, self.sampler.start = self.sampler.start, 0
        try:
            return len(self.sampler)
        finally:
            self.sampler.start = start

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the current epoch, which is the same on all ranks."""
        more: dict[str, Any] = {"num_samples": None, "seed": None}
        if self.sampler is not None:
            more = {"num_samples": self.sampler.num_samples, **self.sampler.state_dict(self._seen)}
        return {"epoch": self.epoch, "seen": self._seen, **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the position, on any number of ranks and with any micro-batch size.

        Raises:
            ValueError: `state` was saved with a data set of another size, or with another order.
        """
        here = self.sampler.num_samples if self.sampler is not None else None
        if state["num_samples"] != here:
            raise ValueError(
                f"the position was saved with training_data of {state['num_samples']} samples, but now there are "
                f"{here}: samples would be skipped or repeated; use the same data, or load without the position "
                "of the loader"
            )
        if self.sampler is not None:
            self.sampler.epoch = max(0, state["epoch"] - 1)
            self.sampler.load_state_dict(state)
        self.epoch, self._seen = state["epoch"], state["seen"]
        self._resumed = self.sampler is not None and self.epoch > 0 and self._left() > 0

    def _left(self) -> int:
        assert self.sampler is not None
        self.sampler.start = self._seen
        return len(self.sampler)


class RepeatingLoader:
    """An endless iterator over a loader, which starts again at its end."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)

    def __len__(self) -> int:
        """Number of micro-batches of one epoch."""
        return len(self.loader)  # type: ignore[arg-type]
