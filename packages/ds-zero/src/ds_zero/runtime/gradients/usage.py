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
    """Parameters had no gradient on some rank, and `ZeroConfig.ignore_unused` is False; the message names them."""


@dataclass(frozen=True)
class UsageCounts:
    """Counts over all ranks. A bucket is identified by its `id`."""

    users: Mapping[int, Sequence[int]]
    """Bucket -> for each of its parameters, the number of ranks on which it had a gradient."""
    flagged: frozenset[int]
    """Buckets that at least one rank has flagged."""


class Usage:
    """Records which parameters of `buckets` have had a gradient since the last step."""

    def __init__(self, buckets: Sequence[Bucket], options: OptimizerOptions, *, ignore_unused: bool) -> None:
        self._buckets, self._options, self._ignore_unused = buckets, options, ignore_unused
        self._own: set[int] = set()
        self._anywhere: set[int] = set()
        """Parameters that had a gradient on any rank at the last call of `drop_unused`."""

    def add(self, param: Tensor) -> None:
        """Records that `param` has a gradient on this rank."""
        self._own.add(id(param))

    def has(self, param: Tensor) -> bool:
        """Whether `param` has had a gradient on this rank since the last step."""
        return id(param) in self._own

    @property
    def any(self) -> bool:
        """Whether a parameter had a gradient on any rank at the last call of `drop_unused`."""
        return bool(self._anywhere)

    def clear(self) -> None:
        """Starts anew, after a step has used the gradients or they were dropped."""
        self._own.clear()
        self._anywhere.clear()

    def count(self, flagged: Sequence[Bucket]) -> UsageCounts:
        """Counts the ranks that have a gradient of each parameter, and merges the sets of `flagged` buckets. The same
        message compares the optimizer's options, which must be equal on all ranks. Collective.

        Raises:
            ValueError: on every rank, if ranks have different options; names them.
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
                    f"the optimizer's options: {differences(self._options.described(), ranks)}. Set the same values on "
                    "every rank. A schedule that depends on a loss needs the same loss on every rank, such as the mean "
                    "over ranks"
                )
        return UsageCounts(users, frozenset(anywhere))

    def drop_unused(self, counts: UsageCounts) -> None:
        """Sets the gradients of parameters without a gradient on any rank to None, as in plain PyTorch, so that the
        optimizer does not update them or their states.

        Raises:
            UnusedParameterError: on every rank, if a parameter had no gradient on some rank and `ignore_unused` is
                False.
        """
        unused = []
        for bucket in self._buckets:
            for shard, slot, param, users in zip(
                bucket.shards, bucket.layout.slots, bucket.params, counts.users[id(bucket)], strict=True
            ):
                if users:
                    self._anywhere.add(id(param))
                elif id(param) not in self._anywhere:
                    shard.grad = None
                if users < bucket.ranks.total and param.requires_grad:
                    unused.append(f"{slot.fqn} ({users} of {bucket.ranks.total} ranks)")
        if unused and not self._ignore_unused:
            raise UnusedParameterError(
                f"{len(unused)} parameters got no gradient on at least one rank since the last step: "
                f"{', '.join(unused[:10])}. The loss does not depend on them there. Freeze them, or allow unused "
                "parameters by ZeroConfig(ignore_unused=True), or in a ds_config.json by "
                "zero_optimization.ignore_unused_parameters"
            )


def sum_over_ranks(values: Sequence[int], ranks: Ranks, device: torch.device) -> list[int]:
    """Returns the element-wise sums over all ranks of `ranks`, including replicas. Collective."""
    counts = torch.tensor(values, dtype=torch.int32).to(device)
    for axis in ranks.axes:
        if axis.group is not None:
            dist.all_reduce(counts, group=axis.group)
    if is_fake(counts):
        return list(
            values
        )  # `plan` runs without values and other ranks: every rank has the values of this one
    total: list[int] = counts.tolist()
    return total
