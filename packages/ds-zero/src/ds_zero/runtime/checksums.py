"""Checksums of a rank's shards: taken when values are written, compared when they are read.

[Note: checksums of shards]
Each rank keeps a checksum of every block of its masters, element-wise optimizer states and reduced gradients ([Note:
checksum of a block] in `tensors/checksums.py`).

gradient        taken when a backward has reduced it, compared when the next backward adds to it or the step reads it
master, state   taken after each step, compared in the next step and when a checkpoint reads them

An optimizer with `step_checksummed` computes both checksums of a step in the pass of the update: the values are
updated first, and compared before anything is published to other ranks. Before and after the steps of other optimizers,
the values are read once more. One all-reduce of a flag per step makes all ranks raise together.

[Note: legal changes]
Code may change shards between two steps: `zero_grad`, loading, torch code that writes to `shard.grad`. Each checksum is
noted with the tensor object and its version counter, which every in-place operation of torch increases. If either is
different at the comparison, the value was changed by torch and is not compared. A flipped bit, a write through a raw
pointer or through numpy leaves the counter as it is; so does a write through `param.data`, which is therefore reported.
Views of one storage share a counter: a write to one entry leaves all entries of its partition uncompared until the next
step. Functions of ds_zero that change values take new checksums at once (`retake`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ds_zero.comm.agreement import gathered_values
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import ChecksummedStep, FusedStep, TakesChecksums
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.storage import GRAD, MASTER
from ds_zero.tensors.checksums import CHECKSUM_BLOCK_NUMEL, checksums, num_checksums

_SHOWN = 3
"""Number of ranges that each rank describes in an error."""
_GRADIENT, _MASTER = 0, 1
"""Rows of an entry; the rows of the states follow."""
_GRADIENTS, _VALUES = slice(_GRADIENT, _MASTER), slice(_MASTER, None)


class ChecksumError(RuntimeError):
    """A rank read other bits from a gradient, master or optimizer state than were written there."""


class NoChecksums:
    """`Checksums` that are off: nothing is computed or compared."""

    enabled = False

    def attach(self, optimizer: Optimizer) -> None:
        """Takes checksums of the masters and states of the optimizer, by its methods from now on."""

    def before_grads_change(self) -> None:
        """Compares the gradients on the shards, because a backward is going to add to them or replace them."""

    def grads_arrived(self) -> None:
        """Takes the checksums of gradients that have none, after a reduction."""

    def step_fused(
        self, optimizer: FusedStep, shards: Sequence[Tensor], scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        """Steps `shards`, compares what was read, and takes checksums of what was written."""
        optimizer.step_fused(shards, grad_scale=scale, out=out)

    def before_step(self) -> None:
        """Compares gradients, masters and states, before a step in which the optimizer does not do so."""

    def after_step(self) -> None:
        """Takes checksums of masters and states, after such a step."""

    def published(self) -> None:
        """Notes that publishing has written to memory of which masters are a part, but not to masters."""

    def before_save(self) -> None:
        """Compares masters and states. Collective.

        Raises:
            ChecksumError: on every rank, if a comparison has failed on any of them.
        """

    def retake(self, buckets: Sequence[Bucket]) -> None:
        """Takes checksums anew after values of some buckets were changed, and for others where torch changed them."""

    def loaded(self) -> None:
        """Takes all checksums anew and forgets failed comparisons, after a checkpoint was loaded."""

    def require_equal(self) -> None:
        """Collective.

        Raises:
            ChecksumError: on every rank, if a comparison has failed on any of them since a checkpoint was loaded.
        """


@dataclass(frozen=True)
class _Stamp:
    """A tensor object and its version when its checksum was taken."""

    tensor: weakref.ref[Tensor]
    version: tuple[int, int]


@dataclass(eq=False)
class _Entry:
    """One optimizer entry with elements: rows of its gradient, its master and its element-wise states."""

    bucket: Bucket
    index: int
    names: tuple[str, ...] = ()
    """Names of the states."""
    rows: tuple[Tensor, Tensor, Tensor] = ()  # type: ignore[assignment]
    """(rows, blocks) int64, views of the buffers: checksums noted, and those of what a step read and wrote."""
    stamps: list[_Stamp | None] = field(default_factory=list)
    """For each row; None: it has no checksum to compare."""

    @property
    def shard(self) -> Tensor:
        return self.bucket.shards[self.index]

    def kind(self, row: int) -> str:
        return ("gradient", "master", *self.names)[row]

    def stamp(self, tensor: Tensor) -> _Stamp:
        # A whole parameter that is its own master may be written through either tensor.
        own = tensor is self.shard and self.bucket.whole and not self.bucket.storage.masters_apart
        return _Stamp(weakref.ref(tensor), (tensor._version, self._param_version if own else 0))

    @property
    def _param_version(self) -> int:
        return self.bucket.params[self.index]._version

    def is_valid(self, row: int, tensor: Tensor | None) -> bool:
        """Whether the checksum of `row` belongs to the present values of `tensor`."""
        stamp = self.stamps[row]
        if stamp is None or tensor is None or stamp.tensor() is not tensor:
            return False
        return stamp.version == self.stamp(tensor).version


class Checksums(NoChecksums):
    """The checksums of one model's shards, [Note: checksums of shards]."""

    enabled = True

    def __init__(self, buckets: Sequence[Bucket], groups: Sequence[Ranks]) -> None:
        """
        Args:
            groups: ranks that raise together.

        Raises:
            ValueError: masters or gradients are not in memory.
        """
        self._entries = [
            _Entry(bucket, index)
            for bucket in buckets
            for index, shard in enumerate(bucket.shards)
            if shard.numel()
        ]
        self._buckets = buckets
        for bucket in buckets:
            _require_in_memory(bucket)
        self._of_shard = {id(entry.shard): entry for entry in self._entries}
        self._axes = [axis for ranks in groups for axis in ranks.axes if axis.group is not None]
        self._device = next((b.device for b in buckets), torch.device("cpu"))
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._noted = self._read = self._written = torch.empty(0, dtype=torch.int64)
        self._failures: list[str] = []
        self._lay_out(force=True)

    def attach(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.loaded()

    # --- rows

    def _held(self, entry: _Entry) -> dict[str, Tensor]:
        """Element-wise states."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        held = optimizer.state.get(entry.shard) if optimizer is not None else None
        if not held:
            return {}
        numel = entry.shard.numel()
        return {n: v for n, v in held.items() if isinstance(v, Tensor) and v.ndim and v.numel() == numel}

    def _names(self, entry: _Entry) -> tuple[str, ...]:
        optimizer: object = self._optimizer() if self._optimizer is not None else None
        if isinstance(optimizer, ChecksummedStep):
            return tuple(optimizer.checksummed_states(entry.shard))
        return tuple(sorted(self._held(entry)))

    def _values(self, entry: _Entry) -> list[Tensor | None]:
        held = self._held(entry)
        return [entry.shard.grad, entry.shard, *(held.get(name) for name in entry.names)]

    def _lay_out(self, *, force: bool = False) -> None:
        """Makes room for the states that exist now. Checksums of rows that stay are kept."""
        names = [self._names(entry) for entry in self._entries]
        if not force and all(e.names == n for e, n in zip(self._entries, names, strict=True)):
            return
        shapes = [
            (2 + len(n), num_checksums(e.shard.numel())) for e, n in zip(self._entries, names, strict=True)
        ]
        sizes = [rows * blocks for rows, blocks in shapes]
        device = self._entries[0].shard.device if self._entries else self._device
        buffers = [torch.zeros(sum(sizes), dtype=torch.int64, device=device) for _ in range(3)]
        views = zip(*(buffer.split(sizes) for buffer in buffers), strict=True)
        for entry, new, shape, three in zip(self._entries, names, shapes, views, strict=True):
            old = {entry.kind(row): row for row in range(len(entry.stamps))}
            noted, read, written = (view.view(shape) for view in three)
            stamps: list[_Stamp | None] = []
            for row, kind in enumerate(("gradient", "master", *new)):
                before = old.get(kind)
                stamps.append(None if before is None else entry.stamps[before])
                if before is not None:
                    noted[row] = entry.rows[0][before]
            entry.names, entry.stamps, entry.rows = new, stamps, (noted, read, written)
        self._noted, self._read, self._written = buffers

    def _compute(self, tensors: list[Tensor], rows: list[Tensor]) -> None:
        if not tensors:
            return
        optimizer = self._optimizer() if self._optimizer is not None else None
        compute = optimizer.checksums if isinstance(optimizer, TakesChecksums) else checksums
        compute([t.detach() for t in tensors], rows)

    def _take(self, rows: slice, anew: Sequence[Bucket] = ()) -> None:
        """Takes the checksums of the given rows that are not valid, and of all of them in the buckets `anew`."""
        tensors: list[Tensor] = []
        sums: list[Tensor] = []
        changed = {id(bucket) for bucket in anew}
        for entry in self._entries:
            for row, value in list(enumerate(self._values(entry)))[rows]:
                if value is None:
                    entry.stamps[row] = None
                elif id(entry.bucket) in changed or not entry.is_valid(row, value):
                    tensors.append(value)
                    sums.append(entry.rows[0][row])
                    entry.stamps[row] = entry.stamp(value)
        self._compute(tensors, sums)

    def _compare(self, rows: slice) -> None:
        """Computes the checksums of the given rows of all entries, and compares those that are valid."""
        self._read.zero_()
        tensors: list[Tensor] = []
        sums: list[Tensor] = []
        valid: set[tuple[int, int]] = set()
        for position, entry in enumerate(self._entries):
            for row, value in list(enumerate(self._values(entry)))[rows]:
                if value is not None and entry.is_valid(row, value):
                    valid.add((position, row))
                    tensors.append(value)
                    sums.append(entry.rows[1][row])
        self._compute(tensors, sums)
        self._find(valid)

    def _find(self, valid: set[tuple[int, int]]) -> None:
        """Notes the differences between the checksums of what was read and those noted, in valid rows."""
        for position, entry in enumerate(self._entries):
            for row in range(len(entry.stamps)):
                if (position, row) not in valid:
                    entry.rows[1][row] = entry.rows[0][row]
        if torch.equal(self._read, self._noted):
            return
        for entry in self._entries:
            noted, read = entry.rows[0], entry.rows[1]
            for row in (noted != read).any(1).nonzero().view(-1).tolist():
                blocks = (noted[row] != read[row]).nonzero().view(-1).tolist()
                self._failures.append(_described(entry, row, blocks))

    # --- gradients

    def before_grads_change(self) -> None:
        if any(entry.stamps[_GRADIENT] is not None for entry in self._entries):
            self._compare(_GRADIENTS)
        for entry in self._entries:
            entry.stamps[_GRADIENT] = None

    def grads_arrived(self) -> None:
        self._take(_GRADIENTS)

    # --- steps

    def step_fused(
        self, optimizer: FusedStep, shards: Sequence[Tensor], scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        if not isinstance(optimizer, ChecksummedStep):
            super().step_fused(optimizer, shards, scale, out)
            return
        self._lay_out()
        live = {id(shard) for shard in shards}
        valid = {
            (position, row)
            for position, entry in enumerate(self._entries)
            if id(entry.shard) in live
            for row, value in enumerate(self._values(entry))
            if entry.is_valid(row, value)
        }
        self._read.zero_()
        self._written.zero_()
        stepped = [(s, o, self._of_shard[id(s)]) for s, o in zip(shards, out, strict=True) if s.numel()]
        optimizer.step_checksummed(
            [shard for shard, _, _ in stepped],
            grad_scale=scale,
            out=[copy for _, copy, _ in stepped],
            read=[entry.rows[1] for _, _, entry in stepped],
            written=[entry.rows[2] for _, _, entry in stepped],
        )
        self._find(valid)
        for _, _, entry in stepped:
            entry.rows[0][_MASTER:].copy_(entry.rows[2][_MASTER:])
            entry.stamps = [
                None,
                *(v if v is None else entry.stamp(v) for v in self._values(entry)[_MASTER:]),
            ]

    def before_step(self) -> None:
        self._compare(slice(None))

    def after_step(self) -> None:
        self._lay_out()
        self._take(_VALUES, self._buckets)

    def published(self) -> None:
        for entry in self._entries:
            stamp = entry.stamps[_MASTER]
            if stamp is not None and stamp.tensor() is entry.shard:
                entry.stamps[_MASTER] = entry.stamp(entry.shard)

    def before_save(self) -> None:
        self._compare(_VALUES)
        self.require_equal()

    def retake(self, buckets: Sequence[Bucket]) -> None:
        self._lay_out()
        self._take(slice(None), buckets)

    def loaded(self) -> None:
        self._failures.clear()
        self.retake(self._buckets)

    def require_equal(self) -> None:
        flag = torch.tensor([int(bool(self._failures))], device=self._device)
        for axis in self._axes:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=axis.group)
        if not flag.item():
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        own = [f"on rank {rank}, {failure}" for failure in self._failures[:_SHOWN]]
        texts = [text for one in gathered_values(own, self._axes) for text in one]
        raise ChecksumError(_message(list(dict.fromkeys(texts))))


def _require_in_memory(bucket: Bucket) -> None:
    if bucket.storage.is_away(MASTER, GRAD):
        raise ValueError(
            f"ZeroConfig(checksums=True): the store keeps the values of {bucket.layout.slots[0].fqn!r} away, but the "
            "checksums of shards are computed from tensors in memory: use a store that keeps masters and gradients in "
            "memory (ds_offload.HostStore), or remove checksums"
        )


def _described(entry: _Entry, row: int, blocks: Sequence[int]) -> str:
    start = entry.bucket.storage.pieces[entry.index].start
    first = start + blocks[0] * CHECKSUM_BLOCK_NUMEL
    last = start + min((blocks[0] + 1) * CHECKSUM_BLOCK_NUMEL, entry.shard.numel()) - 1
    more = f" and {len(blocks) - 1} further ranges" if len(blocks) > 1 else ""
    fqn = entry.bucket.layout.slots[entry.index].fqn
    return f"{entry.kind(row)} of {fqn!r}, elements {first} to {last}{more}"


def _message(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} further" if len(texts) > _SHOWN else ""
    return (
        f"checksums differ: {'; '.join(texts[:_SHOWN])}{more}. These values were changed between the moment they were "
        "written and the moment they were read, by faulty memory or by code that writes past torch (through .data, "
        "numpy or a pointer). No rank has received an update that was computed from them, and no checkpoint contains "
        "them. This training cannot continue: load the newest checkpoint. If it comes back on the same rank, test the "
        "memory of its host (and its GPU) and take it out of use"
    )
