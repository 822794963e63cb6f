"""Takes gradients as backward produces them, reduces them bucket by bucket, and leaves the sums on the
optimizer's shards.

[Note: two plans]
local    every micro-batch but the last adds its gradients to a whole fp32 buffer on each rank; one reduction
at the boundary. sharded  every micro-batch is reduced; the shard of the sum is added to the shard of what
came before. Without accumulation both send fresh gradients in their own dtype.

[Note: launch order]
All ranks must start the same reductions in the same order. Buckets are numbered in the order in which
backward completes them (reverse of registration) and bucket k starts only after k-1, whatever order their
gradients arrive in; what is incomplete at the end of backward is filled with zeros and sent then. So a
parameter that one rank did not use delays, but never mismatches.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.backward import BackwardWatch
from ds_zero.bucket import Bucket
from ds_zero.comm import Comm, Done
from ds_zero.interfaces import ShardKey, ShardStore, Work
from ds_zero.layout import BucketLayout
from ds_zero.ranks import Ranks


class GradBuffer:
    """Whole gradients of one bucket; gaps between slots are zero, slots are undefined until first written."""

    def __init__(self, layout: BucketLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(layout.padded_numel, dtype=dtype, device=device)
        for begin, end in layout.gaps():
            self.tensor[begin:end].zero_()
        self._layout = layout
        self._filled: set[int] = set()

    def add(self, index: int, grad: Tensor) -> None:
        slot = self._layout.slots[index]
        view = self.tensor[slot.offset : slot.end].view(slot.shape)
        if index in self._filled:
            view.add_(grad)
        else:
            view.copy_(grad)
            self._filled.add(index)

    def zero_missing(self) -> None:
        for index, slot in enumerate(self._layout.slots):
            if index not in self._filled:
                self.tensor[slot.offset : slot.end].zero_()


@dataclass
class _Pending:
    """One bucket during one accumulation."""

    fresh: GradBuffer | None = None
    """Gradients of the present micro-batch, in their own dtype."""
    local: GradBuffer | None = None
    """fp32 sums of micro-batches that were not reduced."""
    missing: int = 0
    """Gradients that the present backward has not delivered yet."""


@dataclass
class _Flight:
    bucket: Bucket
    work: Work
    wire: Tensor
    reduced: Tensor


class Reducer:
    """Reduces the trainable buckets of one model. Collective like backward itself."""

    def __init__(
        self,
        buckets: list[Bucket],
        *,
        ranks: Ranks,
        comm: Comm,
        store: ShardStore,
        local_plan: bool,
        steps: int | None,
        watch: BackwardWatch,
    ) -> None:
        self.buckets = [b for b in buckets if b.trainable]
        self.local_plan = local_plan
        self.sync_depth = 0
        """How many `no_sync` contexts are open."""
        self._ranks, self._comm, self._store = ranks, comm, store
        self._steps, self._learned_steps = steps, steps
        self._watch = watch
        watch.at_end(self._end_backward)
        watch.at_abort(self._forget_all)
        self._pending = {id(b): _Pending(missing=len(b.params)) for b in self.buckets}
        self._flights: list[_Flight] = []
        self._next = 0
        self._backwards = 0
        self._in_backward = False
        self._final = False
        self._deferred = False
        """Whether a backward since the last reduction was not reduced: then every rank sends fp32 sums, also
        for buckets whose parameters it did not use itself."""
        self._used: set[int] = set()
        self._touched = False
        self._unwatched = [p for b in self.buckets for p in b.params]
        self._where = {id(p): (b, i) for b in self.buckets for i, p in enumerate(b.params)}

    # --- hooks

    def install(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Watch every trainable parameter that is not watched yet; the hooks do not keep this object alive.

        Called before every forward too: a parameter that is frozen now cannot be hooked, and may be trained
        later.
        """
        found = [p for p in self._unwatched if p.requires_grad]
        if not found:
            return []
        self._unwatched = [p for p in self._unwatched if not p.requires_grad]
        me = weakref.ref(self)

        def on_grad(param: Tensor) -> None:
            reducer = me()
            if reducer is not None:
                reducer._arrive(param)

        return [p.register_post_accumulate_grad_hook(on_grad) for p in found]

    def _arrive(self, param: Tensor) -> None:
        bucket, index = self._where[id(param)]
        self._begin_backward()
        grad = param.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.to_dense()
        pending = self._pending[id(bucket)]
        with torch.no_grad():
            if self._deferred:
                if pending.local is None:
                    pending.local = GradBuffer(bucket.layout, torch.float32, bucket.device)
                pending.local.add(index, grad)
            else:
                if pending.fresh is None:
                    pending.fresh = GradBuffer(bucket.layout, bucket.dtype, bucket.device)
                pending.fresh.add(index, grad)
        param.grad = None
        self._used.add(id(param))
        pending.missing -= 1
        if self._final:
            self._launch_ready()

    def _begin_backward(self) -> None:
        if self._in_backward:
            return
        if not self._touched:
            self._note_stale_grads()
        self._in_backward = self._touched = True
        self._backwards += 1
        self._next = 0
        self._final = self._is_final()
        self._deferred = self._deferred or not self._final
        for bucket in self.buckets:
            self._pending[id(bucket)].missing = sum(p.requires_grad for p in bucket.params)
        self._watch.arm()

    def _is_final(self) -> bool:
        """Whether the backward that begins now is reduced while it runs."""
        if self.sync_depth:
            return False
        return not self.local_plan or (
            self._learned_steps is not None and self._backwards >= self._learned_steps
        )

    def _note_stale_grads(self) -> None:
        """Warn where a step happened and gradients were not cleared.

        Legal in torch, but in a sharded loop almost always `model.zero_grad()`, which does not reach shards.
        """
        first = next((s.grad for b in self.buckets for s in b.shards if s.grad is not None), None)
        if first is None or not first.any():
            return
        warnings.warn(
            "gradients of the previous step are still on the shards and the new ones will be added to them; "
            "call optimizer.zero_grad() (model.zero_grad() does not reach shards)",
            stacklevel=2,
        )

    # --- reduction

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and self._pending[id(self.buckets[self._next])].missing == 0:
            self._launch(self.buckets[self._next])
            self._next += 1

    def _launch(self, bucket: Bucket) -> None:
        """Start the reduction of what has accumulated; missing gradients count as zeros."""
        pending = self._pending[id(bucket)]
        # The same dtype on every rank, whether or not this rank has gradients for the bucket.
        dtype = torch.float32 if self._deferred else bucket.dtype
        source = pending.local or pending.fresh or GradBuffer(bucket.layout, dtype, bucket.device)
        pending.local = pending.fresh = None
        source.zero_missing()
        wire = source.tensor
        begin, end = bucket.layout.slice_range(self._ranks.rank)
        with torch.profiler.record_function(f"ds.zero.reduce_scatter/{bucket.layout.name}"), torch.no_grad():
            if self._ranks.group is None:
                reduced = wire.float()
                work: Work | None = None
            else:
                reduced = torch.empty(end - begin, dtype=torch.float32, device=bucket.device)
                work = self._comm.reduce_scatter(
                    reduced, wire, self._ranks.group, dist.ReduceOp.AVG, async_op=True
                )
        self._flights.append(_Flight(bucket, work or Done(), wire, reduced))
        # One reduction stays in flight behind the one that starts: memory is bounded by two buckets, whatever
        # the model's size.
        while len(self._flights) > 2:
            self._land(self._flights.pop(0))

    def _land(self, flight: _Flight) -> None:
        flight.work.wait()
        bucket, grad = flight.bucket, flight.reduced
        with torch.no_grad():
            if bucket.layout.num_owners != self._ranks.size and self._ranks.group is not None:
                # Stage 0: every rank needs every slice of the sum.
                grad = self._comm.gather_slices(grad, self._ranks, grad.device)
            self._sink(bucket, grad)

    def _sink(self, bucket: Bucket, grad: Tensor) -> None:
        """Add to the shards' gradients, or set those that are None: a None starts a new accumulation."""
        if bucket.grad is None:
            raise AssertionError("gradients have no room")
        key = ShardKey(name=bucket.layout.name, kind="grad")
        keep = [s.grad is not None for s in bucket.shards]
        views = bucket.grad_views(self._ranks.rank)
        if all(keep) or not any(keep):
            self._store.sink_grad(key, grad, offset=0, accumulate=all(keep)).wait()
        else:
            for (_, numel, offset), accumulate in zip(bucket.pieces(self._ranks.rank), keep, strict=True):
                part = grad[offset : offset + numel]
                self._store.sink_grad(key, part, offset=offset, accumulate=accumulate).wait()
        for shard, view in zip(bucket.shards, views, strict=True):
            if shard.grad is None and shard.numel():
                shard.grad = view

    def _end_backward(self) -> None:
        if not self._in_backward:
            return
        if self._final:
            self._flush()
        self._in_backward = False

    def _forget_all(self) -> None:
        """A backward raised half-way: drop everything that has accumulated since the last step."""
        warnings.warn(
            "the previous backward did not finish; the gradients accumulated since the last step were dropped",
            stacklevel=2,
        )
        self.forget()

    def forget(self) -> None:
        """Drop every gradient since the last step, of values that are no longer there."""
        while self._flights:
            self._flights.pop(0).work.wait()
        for bucket in self.buckets:
            self._pending[id(bucket)] = _Pending()
            for shard in bucket.shards:
                shard.grad = None
            for param in bucket.params:
                param.grad = None
        self._in_backward = self._touched = self._deferred = False
        self._backwards = 0
        self._used.clear()

    def _flush(self) -> None:
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        self._next = len(self.buckets)
        self._deferred = False
        while self._flights:
            self._land(self._flights.pop(0))

    # --- boundary

    def finish(self) -> bool:
        """Reduce what still waits, so that the shards' gradients are complete; called before norms and steps.

        Returns:
            Whether gradients have arrived since the last call.
        """
        if not self._touched:
            return False
        if self._deferred:
            self._next = 0
            self._flush()
        self._forget_unused()
        if self._steps is None:
            self._learned_steps = self._backwards
        self._backwards = 0
        self._touched = False
        return True

    def _forget_unused(self) -> None:
        """Parameters that no rank used have no gradient, as in plain PyTorch; their states and values must
        not move.
        """
        used = torch.tensor([id(p) in self._used for b in self.buckets for p in b.params], dtype=torch.uint8)
        if self._ranks.group is not None:
            device = self.buckets[0].device if self.buckets else torch.device("cpu")
            used = used.to(device)
            dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._ranks.group)
        flags = iter(used.tolist())
        for bucket in self.buckets:
            for shard in bucket.shards:
                if not next(flags):
                    shard.grad = None

    def stepped(self) -> None:
        """The optimizer has used the gradients; what counts as used starts anew."""
        self._used.clear()

    def local_bytes(self) -> int:
        """Bytes of whole fp32 gradients that the local plan holds now."""
        found = [p.local.tensor for p in self._pending.values() if p.local is not None]
        return sum(t.numel() * t.element_size() for t in found)
