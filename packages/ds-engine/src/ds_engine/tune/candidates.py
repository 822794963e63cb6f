"""The configurations among which `ds tune` chooses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration."""

    stage: int
    micro: int
    """Samples of one forward on one rank."""
    steps: int
    """Micro-batches of one optimizer step."""
    offload: str = "none"
    """Where masters, gradients and optimizer states are: "none" or "cpu"."""
    recompute: bool = False
    """Whether every block recomputes its activations in the backward."""

    @property
    def group(self) -> tuple[object, ...]:
        """Candidates of one group differ in batch sizes only: what one of them shows says most about the others."""
        return self.stage, self.offload, self.recompute

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration `base` with the settings of this candidate."""
        config: dict[str, Any] = {
            key: copy.deepcopy(value) for key, value in base.items() if key not in _SIZES
        }
        config.pop("autotuning", None)
        zero = dict(config.get("zero_optimization") or {})
        zero["stage"] = self.stage
        place = dict(zero.pop("offload_optimizer", None) or {})
        zero.pop("offload_param", None)
        if self.offload != "none":
            zero["offload_optimizer"] = place | {"device": self.offload}
        config["zero_optimization"] = zero
        config["train_micro_batch_size_per_gpu"] = self.micro
        config["gradient_accumulation_steps"] = self.steps
        return config

    def __str__(self) -> str:
        text = f"stage {self.stage}, micro-batch {self.micro}"
        if self.steps > 1:
            text += f" x {self.steps}"
        if self.offload != "none":
            text += f", offload to {self.offload}"
        return text + (", activations recomputed" if self.recompute else "")


@dataclass(frozen=True, kw_only=True)
class Space:
    """The limits of the search."""

    ranks: int
    train_batch: int | None
    """Samples of a step over all ranks, which stays as it is; None: every size of a step may be tried."""
    steps: int = 1
    """Micro-batches of a step where `train_batch` is None."""
    stages: Sequence[int] = (0, 1, 2, 3)
    offloads: Sequence[str] = ("none",)
    recompute: Sequence[bool] = (False,)
    min_micro: int = 1
    max_micro: int = 1024
    min_train: int = 1
    max_train: int | None = None

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(micro-batch, number of micro-batches): powers of two, or the divisors of a given batch."""
        if self.train_batch is not None:
            of_rank, rest = divmod(self.train_batch, self.ranks)
            if rest == 0:
                for micro in range(max(1, self.min_micro), min(of_rank, self.max_micro) + 1):
                    if of_rank % micro == 0:
                        yield micro, of_rank // micro
            return
        micro = 1
        while micro <= self.max_micro:
            train = micro * self.steps * self.ranks
            if micro >= self.min_micro and train >= self.min_train and train <= (self.max_train or train):
                yield micro, self.steps
            micro *= 2


def candidates(space: Space) -> list[Candidate]:
    """All candidates, those that need least memory first in each group.

    Raises:
        ValueError: the limits leave none.
    """
    made = [
        Candidate(stage=stage, micro=micro, steps=steps, offload=offload, recompute=recompute)
        for stage in space.stages
        for offload in space.offloads
        for recompute in space.recompute
        for micro, steps in space.sizes()
    ]
    if made:
        return made
    if space.train_batch is not None and space.train_batch % space.ranks:
        raise ValueError(
            f"train_batch_size {space.train_batch} is not a multiple of {space.ranks} ranks: change it, or remove it, "
            "so that every batch size may be tried"
        )
    raise ValueError(
        f"no micro-batch from {space.min_micro} to {space.max_micro} gives an allowed train_batch_size: change the "
        "limits of autotuning"
    )
