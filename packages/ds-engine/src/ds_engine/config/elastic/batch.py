"""Chooses the batch of the section `elasticity`, and divides it among a number of ranks.

[Note: versions of elasticity]
In version 0.1 single ranks may be added or removed, and a number of ranks to which the batch cannot be divided is
refused. In version 0.2 whole machines are added or removed: the batch can be divided among any number of machines with
`ranks_per_node` ranks each, of which `model_parallel` process the same samples. Any other number of ranks is accepted,
too, with the best batch for that number, so the batch size then depends on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_engine.config.elastic.candidates import candidates, compatible
from ds_engine.config.elastic.errors import ElasticityConfigError, ElasticityIncompatibleWorldSize
from ds_engine.config.support.batch import Batch

ALIKE, BY_MACHINES = 0.1, 0.2
"""See [Note: versions of elasticity]."""
VERSIONS = (ALIKE, BY_MACHINES)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The values of the section `elasticity`, without mistakes."""

    max_batch: int
    """Largest number of samples per optimizer step over all ranks."""
    micro_batches: tuple[int, ...]
    """Allowed numbers of samples per forward pass on one rank; none exceeds `max_batch`."""
    min_ranks: int = 1
    """Smallest number of ranks, model-parallel ones included, that the batch has to suit."""
    max_ranks: int = 10_000
    """Largest number of ranks that the batch has to suit."""
    prefer_larger: bool = True
    """Which of two batches wins that suit equally many numbers of ranks."""
    ranks_per_node: int = 1
    """Version 0.2: number of ranks on each machine, a multiple of `model_parallel`."""
    model_parallel: int = 1
    """Version 0.2: number of ranks that work on the same samples."""
    version: float = BY_MACHINES
    """See [Note: versions of elasticity]."""


@dataclass(frozen=True, kw_only=True)
class ElasticBatch:
    """A batch, and the numbers of ranks among which it can be divided."""

    train: int
    """Number of samples per optimizer step over all ranks."""
    ranks: tuple[int, ...]
    """Numbers of data-parallel ranks, in ascending order."""
    micro_batches: tuple[int, ...]
    """Allowed numbers of samples per forward pass on one rank."""

    def on(self, ranks: int) -> Batch:
        """Returns the batch sizes for one of `self.ranks`, with the largest micro-batch that divides."""
        share = self.train // ranks
        micro = max(size for size in self.micro_batches if share % size == 0)
        return Batch(train=self.train, micro=micro, steps=share // micro, ranks=ranks)


def choose(limits: Limits, ranks: int | None = None) -> ElasticBatch:
    """Returns the batch that suits the most numbers of ranks.

    Args:
        ranks: number of data-parallel ranks, which must be able to share the batch. None: no particular number.

    Raises:
        ElasticityConfigError: no batch suits any number of ranks within the limits.
        ElasticityIncompatibleWorldSize: no allowed batch can be divided among `ranks`.
    """
    chosen = _for_most_numbers(limits)
    if ranks is None:
        if chosen is None:
            raise ElasticityConfigError([_unsolvable(limits)])
        return chosen
    if chosen is not None and ranks in chosen.ranks:
        return chosen
    alone = _for_one_number(limits, ranks) if limits.version == BY_MACHINES else None
    if alone is None:
        raise ElasticityIncompatibleWorldSize([_unsuitable(limits, chosen, ranks)])
    return alone


def _for_most_numbers(limits: Limits) -> ElasticBatch | None:
    per_node = limits.ranks_per_node if limits.version == BY_MACHINES else 1
    samples_of_node = per_node // limits.model_parallel  # data-parallel ranks of one machine
    smallest, largest = max(1, -(-limits.min_ranks // per_node)), limits.max_ranks // per_node
    best: ElasticBatch | None = None
    for batch in candidates(limits.micro_batches, limits.max_batch // samples_of_node):
        nodes = compatible(batch, limits.micro_batches, smallest, largest)
        if not nodes or (best is not None and len(nodes) < len(best.ranks)):
            continue
        # Candidates ascend: an equal one wins only if the larger batch is preferred.
        if best is None or len(nodes) > len(best.ranks) or limits.prefer_larger:
            best = ElasticBatch(
                train=batch * samples_of_node,
                ranks=tuple(number * samples_of_node for number in nodes),
                micro_batches=limits.micro_batches,
            )
    return best


def _for_one_number(limits: Limits, ranks: int) -> ElasticBatch | None:
    """Returns the largest (or smallest) of the batches that come closest to the limit with one micro-batch size."""
    units = [micro * ranks for micro in limits.micro_batches]
    batches = [limits.max_batch // unit * unit for unit in units if unit <= limits.max_batch]
    if not batches:
        return None
    train = max(batches) if limits.prefer_larger else min(batches)
    return ElasticBatch(train=train, ranks=(ranks,), micro_batches=limits.micro_batches)


def _unsolvable(limits: Limits) -> str:
    return (
        f"elasticity: no batch of up to {limits.max_batch} samples (max_train_batch_size) with micro-batches of "
        f"{_listed(limits.micro_batches)} can be divided among {limits.min_ranks} to {limits.max_ranks} ranks "
        "(min_gpus to max_gpus): raise max_train_batch_size, lower min_gpus, or allow a smaller micro-batch"
    )


def _unsuitable(limits: Limits, chosen: ElasticBatch | None, ranks: int) -> str:
    least = min(limits.micro_batches) * ranks
    if least > limits.max_batch:
        return (
            f"elasticity: {ranks} data-parallel ranks with the smallest micro-batch, {min(limits.micro_batches)}, "
            f"need a batch of {least} samples, more than max_train_batch_size {limits.max_batch}: start at most "
            f"{limits.max_batch // min(limits.micro_batches)} ranks, or raise the limit"
        )
    if chosen is None:
        return f"{_unsolvable(limits)}; the job has {ranks}"
    return (
        f"elasticity: a batch of {chosen.train} samples cannot be divided among {ranks} ranks: start one of the "
        f'compatible numbers of ranks ({_listed(chosen.ranks)}), or set "version" to 0.2, which chooses another batch'
    )


def _listed(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:40]))
    return f"{shown}, and {len(numbers) - 40} more up to {numbers[-1]}" if len(numbers) > 40 else shown
