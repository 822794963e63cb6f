"""Batches with about equal numbers of tokens, and learning rates that follow the number of samples.

Source: Vaswani et al., Attention Is All You Need (2017), section 5.1 (batches by tokens); Goyal et al., Accurate, Large
Minibatch SGD (2017), section 2.1 (linear scaling); Krizhevsky, One weird trick for parallelizing convolutional neural
networks (2014), section 5 (square root).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ds_engine.sampling.shuffle import key_of, shuffled

Picking = Literal["dataloader", "random", "seqlen"]
Scaling = Literal["linear", "sqrt", "none"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How samples are packed into lists."""

    max_tokens: int
    """Maximum number of tokens in a list."""
    min_samples: int = 1
    max_samples: int | None = None
    picking: Picking = "dataloader"
    """Order of the samples: as in the data set, shuffled anew in every epoch, or by ascending length."""


def pack(lengths: NDArray[Any], packing: Packing) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Divides a sequence of samples into lists, each as long as possible.

    Args:
        lengths: number of tokens of each sample, in order.

    Returns:
        First index and last index + 1 of every list, and the number of samples in no list: those longer than
        `max_tokens`, and those of lists with fewer than `min_samples`.
    """
    fits = np.flatnonzero(lengths <= packing.max_tokens)
    ends = np.cumsum(lengths[fits], dtype=np.int64)
    begins: list[int] = []
    stops: list[int] = []
    place = 0
    while place < len(fits):
        before = int(ends[place - 1]) if place else 0
        stop = int(np.searchsorted(ends, before + packing.max_tokens, side="right"))
        if packing.max_samples is not None:
            stop = min(stop, place + packing.max_samples)
        if stop - place >= packing.min_samples:
            begins.append(place)
            stops.append(stop)
        place = stop
    kept = sum(stops) - sum(begins)
    return np.array(begins, dtype=np.int64), np.array(stops, dtype=np.int64), len(lengths) - kept


class TokenBatches:
    """Yields the indices of this rank's micro-batches. A micro-batch is the concatenation of `micro_batch` lists that
    were packed by tokens.

    An optimizer step has `batch` lists on any number of ranks: rank r of W gets the micro-batches k W + r. Lists that
    remain at the end of an epoch are dropped. A `batch_sampler` of torch's `DataLoader`.
    """

    goes_on = False

    def __init__(
        self,
        lengths: NDArray[Any],
        packing: Packing,
        *,
        batch: int,
        micro_batch: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            lengths: number of tokens of each sample.
            batch: number of lists per optimizer step, over all ranks; a multiple of `micro_batch` x `ranks`.

        Raises:
            ValueError: there are not enough samples for one batch.
        """
        self.lengths, self.packing = np.asarray(lengths).reshape(-1).astype(np.int64), packing
        self.batch, self.micro_batch, self.rank, self.ranks, self.seed = batch, micro_batch, rank, ranks, seed
        self.num_samples = len(self.lengths)
        self.start = 0
        self._epoch = 0
        self._plan = self._make()
        if not self.total:
            raise ValueError(
                f"{self.num_samples} samples make {self._made} lists of at most {packing.max_tokens} tokens, fewer "
                f"than the {batch} of one batch: raise max_tokens, or lower train_batch_size or min_batch_size"
            )
        if self._left_out:
            warnings.warn(
                f"{self._left_out} of {self.num_samples} samples are in no batch: they have more than max_tokens "
                f"{packing.max_tokens} tokens, or would be in batches of fewer than {packing.min_samples}",
                stacklevel=2,
            )

    @property
    def epoch(self) -> int:
        """Passes before this one."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        changed = value != self._epoch and self.packing.picking == "random"
        self._epoch = value
        if changed:
            self._plan = self._make()

    @property
    def together(self) -> int:
        return self.micro_batch * self.ranks

    @property
    def total(self) -> int:
        return len(self._plan[1])

    def _make(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Returns the samples in order, and the boundaries of the lists."""
        samples = np.arange(self.num_samples, dtype=np.int64)
        if self.packing.picking == "random":
            samples = shuffled(samples, self.num_samples, key_of(self.seed, self._epoch))
        elif self.packing.picking == "seqlen":
            samples = np.argsort(self.lengths, kind="stable")
        begins, ends, self._left_out = pack(self.lengths[samples], self.packing)
        samples = samples[self.lengths[samples] <= self.packing.max_tokens]
        self._made = len(begins)
        whole = len(begins) // self.batch * self.batch
        return samples, begins[:whole], ends[:whole]

    def __len__(self) -> int:
        return -(-(self.total - self.start) // self.together)

    def __iter__(self) -> Iterator[list[int]]:
        samples, begins, ends = self._plan
        for first in range(self.start + self.rank * self.micro_batch, len(begins), self.together):
            last = min(first + self.micro_batch, len(begins))
            yield [int(i) for n in range(first, last) for i in samples[begins[n] : ends[n]]]

    def sizes(self) -> NDArray[np.int64]:
        """Returns the number of samples of every batch of this epoch, over all ranks."""
        _, begins, ends = self._plan
        sizes: NDArray[np.int64] = (ends - begins).reshape(-1, self.batch).sum(1)
        return sizes

    def samples_at(self, position: int) -> int:
        _, begins, ends = self._plan
        first = position // self.batch * self.batch
        return int((ends - begins)[first : first + self.batch].sum())

    def told(self, position: int) -> Mapping[str, Any]:
        return {"samples": self.samples_at(position)}

    def passed(self, position: int) -> None:
        """Does nothing: this order keeps no history."""

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns the settings from which the lists are computed, except for the lengths."""
        packing = [getattr(self.packing, name) for name in Packing.__dataclass_fields__]
        return {"order": "tokens", "seed": self.seed, "batch": self.batch, "packing": packing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here = self.state_dict(0)
        other = [name for name in here if name != "seed" and state.get(name) != here[name]]
        if other:
            raise ValueError(
                f"batches were packed with {other[0]} {state.get(other[0])}, here with {here[other[0]]}: a "
                "position of one cannot be used in the other; use the same settings, or load without the "
                "position of the loader"
            )
        self.seed = state["seed"]
        self._plan = self._make()

    def describe(self) -> str:
        """Describes the batches of this epoch in one line."""
        sizes = self.sizes()
        return (
            f"{len(sizes)} batches of {self.batch} lists of at most {self.packing.max_tokens} tokens: {sizes.min()} to "
            f"{sizes.max()} samples, {sizes.mean():.1f} on average; {self._left_out} of {self.num_samples} samples "
            "in none of them"
        )


def rate_factor(samples: int, base: int, method: Scaling = "linear") -> float:
    """Returns the factor of the learning rate in a step of `samples` samples, if the rate is for steps of `base`
    samples.
    """
    if method == "none":
        return 1.0
    share = samples / base
    return math.sqrt(share) if method == "sqrt" else share


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Context manager that multiplies the learning rates of all groups by `factor`, for a step inside it, and
    restores them for the schedule.
    """
    if factor == 1.0:
        yield
        return
    before = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        _set(group, lr * factor)
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            _set(group, lr)


def _set(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)  # a captured graph reads the tensor itself
    else:
        group["lr"] = lr
