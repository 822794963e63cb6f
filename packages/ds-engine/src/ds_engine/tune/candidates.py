"""The configurations among which `ds tune` chooses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXPERTS, STAGES = "ep_size", "num_stages"
"""Keyword arguments of a function that makes a model with experts, or a pipeline."""
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
    bucket: int | None = None
    """Elements of a bucket of gradients; None: as in the configuration."""
    tensor: int = 1
    """Ranks that share each layer."""
    sequence: int = 1
    """Ranks that divide each sequence."""
    expert: int = 1
    """Ranks that together hold the experts of a layer; they are among those of the data axis."""
    pipe: int = 1
    """Ranks that hold different layers."""

    @property
    def group(self) -> tuple[object, ...]:
        """Candidates of one group differ in batch sizes and buckets only: what one of them shows says most about the
        others.
        """
        return self.stage, self.offload, self.recompute, self.tensor, self.sequence, self.expert, self.pipe

    @property
    def model_ranks(self) -> int:
        """Ranks that together compute the same samples."""
        return self.tensor * self.sequence * self.pipe

    def arguments(self) -> dict[str, int]:
        """What the user's function that makes the model gets, by keyword: see `Space.experts` and `Space.pipes`."""
        chosen = {EXPERTS: self.expert, STAGES: self.pipe}
        return {name: value for name, value in chosen.items() if value > 1}

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
        if self.bucket is not None:
            zero["reduce_bucket_size"] = self.bucket
        config["zero_optimization"] = zero
        if self.tensor > 1 or "tensor_parallel" in config:
            config["tensor_parallel"] = dict(config.get("tensor_parallel") or {}) | {
                "autotp_size": self.tensor
            }
        if self.sequence > 1 or "sequence_parallel_size" in config:
            config["sequence_parallel_size"] = self.sequence
        config["train_micro_batch_size_per_gpu"] = self.micro
        config["gradient_accumulation_steps"] = self.steps
        return config

    def __str__(self) -> str:
        text = f"stage {self.stage}, micro-batch {self.micro}"
        if self.steps > 1:
            text += f" x {self.steps}"
        if self.offload != "none":
            text += f", offload to {self.offload}"
        for name in ("tensor", "sequence", "expert", "pipe"):
            if getattr(self, name) > 1:
                text += f", {name} {getattr(self, name)}"
        if self.bucket is not None:
            text += f", buckets of {self.bucket:,}"
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
    buckets: Sequence[int | None] = (None,)
    tensors: Sequence[int] = (1,)
    sequences: Sequence[int] = (1,)
    experts: Sequence[int] = (1,)
    """Other than 1 only if the user's function takes `ep_size`."""
    pipes: Sequence[int] = (1,)
    """Other than 1 only if the user's function takes `num_stages`."""
    min_micro: int = 1
    max_micro: int = 1024
    min_train: int = 1
    max_train: int | None = None

    def sizes(self, model_ranks: int = 1) -> Iterator[tuple[int, int]]:
        """(micro-batch, number of micro-batches): powers of two, or the divisors of a given batch.

        Args:
            model_ranks: ranks that together compute the same samples.
        """
        ranks = self.ranks // model_ranks
        if self.train_batch is not None:
            of_rank, rest = divmod(self.train_batch, ranks)
            if rest == 0:
                for micro in range(max(1, self.min_micro), min(of_rank, self.max_micro) + 1):
                    if of_rank % micro == 0:
                        yield micro, of_rank // micro
            return
        micro = 1
        while micro <= self.max_micro:
            train = micro * self.steps * ranks
            if micro >= self.min_micro and train >= self.min_train and train <= (self.max_train or train):
                yield micro, self.steps
            micro *= 2


def _divides(ranks: int, model_ranks: int, experts: int) -> bool:
    return ranks % model_ranks == 0 and ranks // model_ranks % experts == 0


def candidates(space: Space) -> list[Candidate]:
    """All candidates, those that need least memory first in each group.

    Raises:
        ValueError: the limits leave none.
    """
    kinds = itertools.product(
        space.stages,
        space.offloads,
        space.recompute,
        space.tensors,
        space.sequences,
        space.experts,
        space.pipes,
        space.buckets,
    )
    made = [
        Candidate(
            stage=stage,
            micro=micro,
            steps=steps,
            offload=offload,
            recompute=recompute,
            bucket=bucket,
            tensor=tensor,
            sequence=sequence,
            expert=expert,
            pipe=pipe,
        )
        for stage, offload, recompute, tensor, sequence, expert, pipe, bucket in kinds
        if _divides(space.ranks, tensor * sequence * pipe, expert)
        for micro, steps in space.sizes(tensor * sequence * pipe)
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
