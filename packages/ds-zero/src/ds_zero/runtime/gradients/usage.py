"""Which parameters have had a gradient since the last step, on this rank and on any rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.agreement import differences, is_same, own_slot
from ds_zero.comm.ranks import Ranks
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.optimizer_options import OptimizerOptions
from ds_zero.tensors.storage import is_fake


class UnusedParameterError(ValueError):
    """Parameters got no gradient on some rank, where that is not allowed; the message names them."""


@dataclass(frozen=True)
class UsageCounts:
    """What ranks have told each other, by the identity of a bucket."""

    users: Mapping[int, Sequence[int]]
    """For each parameter, the number of ranks on which it had a gradient."""
    flagged: frozenset[int]
    """Buckets that some rank has flagged."""


class Usage:
    """Remembers which parameters of `buckets` had a gradient since the last step."""

    def __init__(self, buckets: Sequence[Bucket], options: OptimizerOptions, *, ignore_unused: bool) -> None:
        self._buckets, self._options, self._ignore_unused = buckets, options, ignore_unused
        self._own: set[int] = set()
        self._anywhere: set[int] = set()
        """What any rank had used when `drop_unused` was called last."""

    def add(self, param: Tensor) -> None:
        """`param` has a gradient on this rank."""
        self._own.add(id(param))

    def has(self, param: Tensor) -> bool:
        """Whether `param` has had a gradient on this rank since the last step."""
        return id(param) in self._own

    @property
    def any(self) -> bool:
        """Whether some parameter had a gradient on any rank when `drop_unused` was called last."""
        return bool(self._anywhere)

    def clear(self) -> None:
        """A step has used the gradients, or they were dropped."""
        self._own.clear()
        self._anywhere.clear()

    def count(self, flagged: Sequence[Bucket]) -> UsageCounts:
        """Count the users of every parameter, tell the other ranks which buckets this one flags, and compare the
        optimizer's options, with which ranks would step apart; one message. Collective.

        Raises:
            ValueError: on every rank, where ranks have different options; names them.
        """
        mine = {id(b) for b in flagged}
        users: dict[int, Sequence[int]] = {}
        anywhere: set[int] = set()
        for ranks in {id(b.ranks): b.ranks for b in self._buckets}.values():
            buckets = [b for b in self._buckets if b.ranks is ranks]
            own = [int(self.has(p)) for b in buckets for p in b.params]
            own += [int(id(b) in mine) for b in buckets]
            own += own_slot(ranks, self._options.digest())
            counts = iter(sum_over_ranks(own, ranks, buckets[0].device))
            users |= {id(b): [next(counts) for _ in b.params] for b in buckets}
            anywhere |= {id(b) for b in buckets if next(counts)}
            if not is_same(list(counts), ranks):
                raise ValueError(
                    f"the optimizer's options: {differences(self._options.described(), ranks)}. Set the same on every "
                    "rank; a schedule that follows a loss needs the same number everywhere, such as the mean over ranks"
                )
        return UsageCounts(users, frozenset(anywhere))

    def drop_unused(self, counts: UsageCounts) -> None:
        """Set the gradients of parameters that no rank has used to None, as in plain PyTorch, so that the optimizer
        leaves their values and states alone.

        Raises:
            UnusedParameterError: on every rank, where parameters must not be unused and some rank has not used one.
        """
        lazy = []
        for bucket in self._buckets:
            for shard, slot, param, users in zip(
                bucket.shards, bucket.layout.slots, bucket.params, counts.users[id(bucket)], strict=True
            ):
                if users:
                    self._anywhere.add(id(param))
                elif id(param) not in self._anywhere:
                    shard.grad = None
                if users < bucket.ranks.total and param.requires_grad:
                    lazy.append(f"{slot.fqn} ({users} of {bucket.ranks.total} ranks)")
        if lazy and not self._ignore_unused:
            raise UnusedParameterError(
                f"{len(lazy)} parameters got no gradient on every rank since the last step: {', '.join(lazy[:10])}. "
                "The loss does not depend on them; freeze them, or allow it with ZeroConfig(ignore_unused=True), in a "
                "ds_config.json with zero_optimization.ignore_unused_parameters"
            )


def sum_over_ranks(values: Sequence[int], ranks: Ranks, device: torch.device) -> list[int]:
    """Element-wise sums over all ranks of `ranks`, replicas included. Collective."""
    counts = torch.tensor(values, dtype=torch.int32).to(device)
    for axis in ranks.axes:
        if axis.group is not None:
            dist.all_reduce(counts, group=axis.group)
    if is_fake(counts):
        return list(values)  # `plan` runs without values: this rank stands for all
    total: list[int] = counts.tolist()
    return total
