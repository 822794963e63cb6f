"""Compares the values that several ranks hold, which must be the same bits on all of them.

[Note: replicated values]
Ranks hold the same values of: parameters that are whole between steps, over all ranks of their bucket; masters,
parameters at rest and optimizer states, over all ranks where they are not sharded (stage 0), else over the rows of a
mesh of two axes. Every rank sums the bytes of each (one pass over memory) and two all-reduces of 16 bytes a
tensor tell whether all are equal. Only if they are not, ranks exchange more: sums of the blocks of the parameters in
question, then the first block that differs.

At stages 1 to 3, a step replaces the parameters of all ranks by values from the shards of their owners. A copy that was
corrupted since the last step is therefore found before a step and not after it, and what was corrupted in an owner's
shard becomes the same on all ranks. In values that stay (stage 0, frozen parameters, rows of a mesh) a difference is
found at any later check, unless training has rounded it away.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.comm.agreement import gathered_values
from ds_zero.comm.ranks import Ranks
from ds_zero.runtime.bucket import Bucket, BucketState
from ds_zero.runtime.storage import MASTER, PARAM
from ds_zero.state import ZeroState
from ds_zero.tensors.block_sums import BLOCK_BYTES, block_sums, mixed_sum

_SHOWN = 3
"""Number of tensors that an error describes."""
_H = TypeVar("_H", bound=Hashable)


class ReplicaError(RuntimeError):
    """Ranks hold different bits of a value that must be the same on all of them."""


@dataclass(frozen=True)
class _Copy:
    """One tensor that several ranks hold."""

    bucket: Bucket
    state: str
    """"parameter", "master", or the optimizer's name of a state."""
    tensor: Tensor
    axes: tuple[Ranks, ...]
    """Groups of the ranks that hold it."""
    first: int
    """Where it begins in the bucket, in elements; states of an entry begin at the entry."""
    fqn: str | None = None
    """The parameter, if the tensor belongs to a single one."""

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The part of each parameter, without the gaps between parameters."""
        if self.fqn is not None:
            yield self.fqn, self.tensor
            return
        for slot in self.bucket.layout.slots:
            low = max(slot.offset - self.first, 0)
            high = min(slot.end - self.first, self.tensor.numel())
            if high > low:
                yield slot.fqn, self.tensor[low:high]


def check_replicas(model: nn.Module) -> None:
    """Compares replicated parameters, masters and optimizer states bit by bit over the ranks. Collective; call it
    right before `optimizer.step()`, for example every 100 steps: [Note: replicated values].

    It finds what makes ranks train different models without an error: faulty memory, a write past the collectives on
    one rank, different kernels on different processors. At stages 1 to 3 each rank alone holds its shards, so only
    replicas are compared there.

    Raises:
        ReplicaError: on every rank, if values differ. The message names the tensors, the ranks that differ from the
            majority, and the first element with its values.
        ValueError: the model is not sharded by `ds_zero.shard`.
    """
    state = _registry.state_of(model)
    state.stepper.settle()
    optimizer = state.optimizer() if state.optimizer is not None else None
    copies = list(_copies(state, optimizer))
    with state.comm.guard("check_replicas"):
        sums = [mixed_sum(copy.tensor) for copy in copies]
        differing = _differing(copies, sums)
        if _any_rank(bool(differing), state):
            raise ReplicaError(_described(differing, state))


def _copies(state: ZeroState, optimizer: Optimizer | None) -> Iterator[_Copy]:
    for bucket in state.buckets:
        both = tuple(a for a in bucket.ranks.axes if a.group is not None)
        storage, first = bucket.storage, bucket.owned_range[0]
        if bucket.state is BucketState.WHOLE and both:
            yield _Copy(bucket, "parameter", bucket.full, both, 0)
        replicas = bucket.ranks.replicas
        across = (replicas,) if replicas is not None and replicas.group is not None else ()
        axes = both if bucket.layout.num_owners == 1 else across
        if not axes:
            continue
        if storage.masters_apart and (master := storage.addressable(MASTER)) is not None:
            yield _Copy(bucket, "master", master.detach(), axes, first)
        elif not bucket.whole and (param := storage.addressable(PARAM)) is not None:
            yield _Copy(bucket, "parameter", param.detach(), axes, first)
        if optimizer is None:
            continue
        for slot, shard in zip(bucket.layout.slots, bucket.shards, strict=False):
            for name, value in sorted(optimizer.state.get(shard, {}).items()):
                if isinstance(value, Tensor) and value.numel():
                    yield _Copy(bucket, name, value, axes, max(slot.offset, first), slot.fqn)


def _differing(copies: Sequence[_Copy], sums: Sequence[Tensor]) -> list[_Copy]:
    """Returns the copies whose sums are not equal on all ranks that hold them. Collective.

    Raises:
        ReplicaError: ranks hold other states; on the ranks that hold them.
    """
    of_axes: dict[tuple[int, ...], list[int]] = {}
    for index, copy in enumerate(copies):
        of_axes.setdefault(tuple(id(a.group) for a in copy.axes), []).append(index)
    differing: list[int] = []
    # The same order on every rank, whatever its shards are: first what all ranks hold.
    for indices in sorted(of_axes.values(), key=lambda some: _order(copies[some[0]])):
        first = copies[indices[0]]
        names = [
            f"{copy.state} of {copy.fqn or copy.bucket.layout.name}" for copy in (copies[i] for i in indices)
        ]
        if not _are_equal(torch.tensor([zlib.crc32("\n".join(names).encode())]), first)[0]:
            raise ReplicaError(
                f"ranks hold different states: {len(names)} on rank {dist.get_rank()}, the last is {names[-1]!r}. "
                "Take every optimizer step, and load every checkpoint, on all ranks"
            )
        equal = _are_equal(torch.stack([sums[i].to(first.bucket.device) for i in indices]), first)
        differing += [i for i, same in zip(indices, equal, strict=True) if not same]
    return [copies[i] for i in sorted(differing)]


def _order(copy: _Copy) -> tuple[int, int]:
    return -len(copy.axes), copy.bucket.layout.axis


def _are_equal(own: Tensor, copy: _Copy) -> list[bool]:
    """Returns for each number whether it is the same on all ranks that hold a copy. Collective."""
    # ~x falls as x rises: one maximum finds the largest and the smallest.
    ends = torch.cat([own, ~own]).to(copy.bucket.device)
    for axis in copy.axes:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=axis.group)
    equal: list[bool] = (ends[: own.numel()] == ~ends[own.numel() :]).tolist()
    return equal


def _any_rank(here: bool, state: ZeroState) -> bool:
    device = state.buckets[0].device if state.buckets else torch.device("cpu")
    flag = torch.tensor([int(here)], device=device)
    for axis in state.ranks.axes:
        if axis.group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=axis.group)
    return bool(flag.item())


def _described(differing: Sequence[_Copy], state: ZeroState) -> str:
    """Returns the same message on every rank. Collective."""
    own: list[str] = []
    shown: Counter[int] = Counter()  # of each set of ranks, so that all of its ranks stop at the same tensor
    for copy in differing:
        for fqn, part in copy.parts():
            if shown[len(copy.axes)] < _SHOWN and (text := _difference(copy, fqn, part)) is not None:
                own.append(text)
                shown[len(copy.axes)] += 1
    texts = list(dict.fromkeys(text for one in gathered_values(own, state.ranks.axes) for text in one))
    more = "; further tensors may differ" if len(texts) >= _SHOWN else ""
    return (
        f"ranks hold different values of what must be the same on all of them: {'; '.join(texts[:_SHOWN])}{more}. "
        "Since the last check either memory was corrupted or a rank changed its values alone (an update under "
        "`if rank == 0`, a random draw). Resume from a checkpoint from before that check; if it comes back on the same "
        "rank, take its machine out of use"
    )


def _difference(copy: _Copy, fqn: str, part: Tensor) -> str | None:
    """Describes how one parameter's values differ; None if they do not. Collective over the ranks that hold it."""
    sums = block_sums(part).tolist()
    all_sums = gathered_values((dist.get_rank(), sums), copy.axes)
    wrong = _minority({rank: tuple(theirs) for rank, theirs in all_sums})
    if wrong is None:
        return None
    columns = list(zip(*(theirs for _, theirs in all_sums), strict=True))
    blocks = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    each = BLOCK_BYTES // part.element_size()
    begin = blocks[0] * each
    mine = part.detach().contiguous().view(-1)[begin : begin + each].cpu()
    values = dict(gathered_values((dist.get_rank(), mine), copy.axes))
    return f"{copy.state} of {fqn!r} {_where(values, wrong, begin, len(blocks), tuple(part.shape))}"


def _where(
    values: Mapping[int, Tensor], wrong: Sequence[int], begin: int, blocks: int, shape: Sequence[int]
) -> str:
    """Names the first element that differs, and its bits."""
    raw = {rank: value.view(torch.uint8).view(value.numel(), -1) for rank, value in values.items()}
    ranks = sorted(raw)
    unequal = torch.stack([(raw[rank] != raw[ranks[0]]).any(1) for rank in ranks]).any(0)
    index = int(unequal.nonzero()[0])
    shown = {rank: _shown(values[rank][index]) for rank in ranks}
    right = next((rank for rank in ranks if rank not in wrong), None)
    count = (
        f"{int(unequal.sum())} elements"
        if blocks == 1
        else f"elements in {blocks} blocks of {BLOCK_BYTES} bytes"
    )
    count = "1 element" if count == "1 elements" else count
    if right is None:
        listed = ", ".join(f"{shown[rank]} on rank {rank}" for rank in ranks[:4])
        return f"differs, and no majority of ranks agrees: {count}, the first is number {begin + index}: {listed}"
    bits = _bits(values[wrong[0]][index]) ^ _bits(values[right][index])
    who = ", ".join(map(str, wrong))
    return (
        f"is different on rank{'s' * (len(wrong) > 1)} {who}: {count}, the first is number {begin + index}: "
        f"{shown[wrong[0]]} instead of {shown[right]}" + (", a single bit" if bits.bit_count() == 1 else "")
    )


def _bits(value: Tensor) -> int:
    return int.from_bytes(bytes(value.view(1).view(torch.uint8).tolist()), "little")


def _shown(value: Tensor) -> str:
    return f"{value.item():.9g}" if value.is_floating_point() else str(value.item())


def _minority(values: Mapping[int, _H]) -> list[int] | None:
    """Returns the ranks whose value is not that of more than half of the ranks; all ranks if there is no such value,
    and None if all are equal.
    """
    (value, count), *others = Counter(values.values()).most_common()
    if not others:
        return None
    return sorted(r for r, v in values.items() if v != value) if 2 * count > len(values) else sorted(values)
