"""The loader that `initialize(training_data=...)` returns, and the order in which ranks see samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ds_engine.sampling.curriculum import CurriculumOrder, Difficulty
from ds_engine.sampling.order import Order


class MicroBatches:
    """The plain order. Indices of this rank's micro-batches in one pass, from any sample of it on.

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

    goes_on = False

    @property
    def together(self) -> int:
        return self.micro_batch * self.ranks

    @property
    def total(self) -> int:
        return self.num_samples

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

    def samples_at(self, position: int) -> None:
        """As many as the configuration says."""

    def told(self, position: int) -> Mapping[str, Any]:
        return {}

    def passed(self, position: int) -> None:
        """Nothing is kept of what was."""

    def state_dict(self, position: int) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "order" in state:
            raise ValueError(f"samples were drawn in order {state['order']!r}, here they are shuffled")
        self.seed = state["seed"]  # or the pass would be another permutation

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
        order: Order | None = None,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            order: another one than `MicroBatches`; None: that.
            num_workers: processes that load, beside this one.
        """
        self.epoch = 0
        """Passes that were started."""
        self._seen = 0
        """Units of the present pass that all ranks have been given: samples, or what the order counts in."""
        self._resumed = False
        self.sampler: Order | None = order
        self.fixed = order is not None
        """Whether samples are put together for one size of optimizer steps."""
        self.post_process_func: Callable[[Any, Mapping[str, Any]], Any] | None = None
        """Applied to every micro-batch: gets it, and what the order tells of it (`current_difficulties`)."""
        options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory}
        options["num_workers"] = num_workers
        if isinstance(dataset, IterableDataset):
            if ranks > 1:
                warnings.warn(
                    "training_data is an IterableDataset, which has to give each rank its own samples "
                    "itself: it is used as it is, and its position is not in checkpoints",
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
        """A new pass; the first one after `load_state_dict` begins where that one stood."""
        goes_on = self.sampler is not None and self.sampler.goes_on and self.epoch > 0
        if not self._resumed and not goes_on:
            self.epoch += 1
            self._seen = 0
        self._resumed = False
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
            if self.epoch == epoch:  # of several passes under way the youngest one counts
                self._seen = place
                sampler.passed(place)
            yield batch if self.post_process_func is None else self.post_process_func(batch, told)

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch if self.post_process_func is None else self.post_process_func(batch, {})

    def samples(self) -> int | None:
        """Samples, over all ranks, of the optimizer step to which the last micro-batch belongs; None: as many as the
        configuration says.
        """
        return None if self.sampler is None else self.sampler.samples_at(max(0, self._seen - 1))

    def set_difficulties(self, functions: Mapping[str, Difficulty]) -> None:
        """The schedules of `"schedule_type": "custom"` in `data_efficiency.data_sampling.curriculum_learning`.

        Args:
            functions: name of a measure -> function from the step, counted from 1, to its difficulty.

        Raises:
            ValueError: samples are not chosen by difficulty, or there is no such measure.
        """
        if not isinstance(self.sampler, CurriculumOrder):
            raise ValueError("data_efficiency.data_sampling.curriculum_learning is not switched on")
        self.sampler.set_difficulties(functions)

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
        more: dict[str, Any] = {"num_samples": None, "seed": None}
        if self.sampler is not None:
            more = {"num_samples": self.sampler.num_samples, **self.sampler.state_dict(self._seen)}
        return {"epoch": self.epoch, "seen": self._seen, **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks and with any micro-batch size.

        Raises:
            ValueError: it belongs to a data set of another size, or another order.
        """
        here = self.sampler.num_samples if self.sampler is not None else None
        if state["num_samples"] != here:
            raise ValueError(
                f"the position belongs to training_data of {state['num_samples']} samples, here are {here}: "
                "samples would be left out or seen twice; use the same data, or load without the loader's position"
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
    """An iterator over a loader that begins again at its end."""

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
        """Of one pass."""
        return len(self.loader)  # type: ignore[arg-type]
