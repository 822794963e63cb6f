"""Takes gradients as backward produces them, reduces them bucket by bucket, and leaves the sums on the
optimizer's shards.

[Note: two plans]
local    Every micro-batch but the last adds its gradients to a whole buffer on each rank, in
         `ZeroConfig.grad_dtype` (fp32 by default). One reduction follows at the accumulation boundary.
sharded  Every micro-batch is reduced, and each rank adds its slice of the result to its shard.

Without accumulation both plans send the gradients in their own dtype.

[Note: launch order]
All ranks must start the same reductions in the same order. Buckets are numbered in the order in which
backward completes them (reverse of registration). Bucket k starts only after bucket k-1, whatever order the
gradients arrive in. A bucket that is still incomplete at the end of backward is filled with zeros and sent
then. So a parameter that one rank did not use delays a reduction, but never mismatches messages.

[Note: repeated arrivals]
Autograd delivers the gradient of a parameter once for each backward that reaches it. Reentrant activation
checkpoints run backwards inside the backward: a parameter that k of them use arrives k times or, where it is
also used outside of them, k + 1 times. Nothing announces the count beforehand, and ranks may differ in it.
So the reducer counts arrivals for each parameter and remembers the largest number that one backward has
brought; a bucket is complete when every parameter has arrived that often. The remembered counts decide only
when a rank is ready to start a reduction, never the order, so ranks need not agree on them.
A gradient that arrives after its bucket has left, as in the first backward, starts the bucket's next round:
it stays whole on its rank and travels with the bucket's next reduction. At the accumulation boundary the
message that counts the users of each parameter also says which buckets have such gradients on any rank, and
all ranks reduce those once more.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from ds_zero.comm.collectives import Comm
from ds_zero.interfaces import Reduction
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.arrivals import Arrivals, Pending
from ds_zero.runtime.gradients.backward import BackwardWatch
from ds_zero.runtime.gradients.grad_buffer import FreshGrads, GradBuffer
from ds_zero.runtime.gradients.param_grads import ParamGrads
from ds_zero.runtime.gradients.reduce_policy import ReducePolicy, require_whole_grads
from ds_zero.runtime.gradients.reductions import Reductions, whole_buffer
from ds_zero.runtime.gradients.usage import Usage, UsageCounts, sum_over_ranks
from ds_zero.runtime.gradients.zero_grad_watch import Flag
from ds_zero.runtime.optimizer_options import OptimizerOptions


class Reducer:
    """Reduces the trainable buckets of one model. Collective like backward itself."""

    def __init__(
        self,
        buckets: list[Bucket],
        comm: Comm,
        policy: ReducePolicy,
        watch: BackwardWatch,
        before_accumulation: Callable[[], None],
        param_grads: ParamGrads,
        options: OptimizerOptions,
    ) -> None:
        """`before_accumulation` is called when a backward begins after the gradients on the shards were complete."""
        self.buckets = [b for b in buckets if b.trainable]
        self.policy = policy
        self.param_grads = param_grads
        self.sync_depth = 0
        """How many `no_sync` contexts are open."""
        self.requires_sync = True
        """Whether backwards outside of them are reduced."""
        self._learned_steps = policy.steps
        self._before_accumulation = before_accumulation
        self._watch = watch
        self._pending = {id(b): Pending(Arrivals(len(b.params))) for b in self.buckets}
        self._reductions = Reductions(self.buckets, comm, policy)
        self._next = 0
        """Index of the first bucket that has not left in the present backward."""
        self._backwards = 0
        self._in_backward = False
        self._final = False
        self._deferred = False
        """Whether a backward since the last reduction was not reduced: then every rank sends such sums, also
        for buckets whose parameters it did not use itself."""
        self._flag = Flag()
        """[Note: gradients that wait]"""
        self._late_flag = Flag()
        """The same for gradients that arrived after their bucket had left."""
        self._usage = Usage(self.buckets, options, ignore_unused=policy.ignore_unused)
        self._touched = False
        self._consumed = False
        """Whether a step has used the gradients on the shards."""
        self._unwatched = [p for b in self.buckets for p in b.params]
        self._where = {
            id(p): (position, b, i) for position, b in enumerate(self.buckets) for i, p in enumerate(b.params)
        }

    @property
    def reduction(self) -> Reduction:
        """When and by whom gradients are reduced."""
        return self.policy.reduction

    def set_reduction(self, reduction: Reduction) -> None:
        """Change that, between a step and the next backward."""
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"reduction={reduction!r}: give one of {', '.join(map(repr, get_args(Reduction)))}"
            )
        self._notice_drop()
        waits = not self._consumed and any(s.grad is not None for s in self._shards())
        if self._touched or waits:
            raise ValueError(
                f"reduction={reduction!r} between a backward and its step: the gradients of that backward are reduced "
                f"as {self.reduction!r} says; change it after optimizer.step() or optimizer.zero_grad()"
            )
        if reduction == "none":
            require_whole_grads(self.buckets)
        self.policy = replace(self.policy, reduction=reduction)

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

        def on_grad(param: nn.Parameter) -> None:
            reducer = me()
            if reducer is not None:
                reducer._arrive(param)

        return [p.register_post_accumulate_grad_hook(on_grad) for p in found]

    def _arrive(self, param: nn.Parameter) -> None:
        position, bucket, index = self._where[id(param)]
        grad = self.param_grads.take(param)
        self._begin_backward()
        if grad.is_sparse and not bucket.layout.by_rows:
            grad = grad.to_dense()
        pending = self._pending[id(bucket)]
        with torch.no_grad():
            if self._deferred and position >= self._next:
                if pending.local is None:
                    pending.local = whole_buffer(bucket, self.policy.grad_dtype)
                pending.local.add(index, grad)
            else:
                if pending.fresh is None:
                    pending.fresh = self._reductions.room_for(bucket)
                pending.fresh.add(index, grad)
        self._usage.add(param)
        pending.arrivals.count(index)
        if self._final:
            self._launch_ready()

    def _begin_backward(self) -> None:
        if self._in_backward:
            return
        self._notice_drop()
        if not self._touched:
            self._begin_accumulation()
        self._in_backward = self._touched = True
        self._backwards += 1
        self._next = 0
        self._final = self._is_final()
        self._deferred = self._deferred or not self._final
        if self._final:
            self._flag.lower()
        else:
            self._flag.raise_on(self._shards(), self.policy.grad_dtype)
        for bucket in self.buckets:
            self._pending[id(bucket)].arrivals.begin(bucket.params)
        self._watch.arm()

    def _notice_drop(self) -> None:
        """Drop what waits where `zero_grad` has dropped the shards' gradients, to which it belongs."""
        if not self._touched or self._in_backward:
            return
        if self._flag.dropped:
            self._drop()
        elif self._late_flag.dropped:
            self._drop_late()

    def _is_final(self) -> bool:
        """Whether the backward that begins now is reduced while it runs."""
        if self.sync_depth or not self.requires_sync or self.reduction == "none":
            return False
        return self.reduction == "sharded" or (
            self._learned_steps is not None and self._backwards >= self._learned_steps
        )

    def _begin_accumulation(self) -> None:
        """The first backward after the gradients on the shards were complete begins. It adds to `shard.grad`, or
        starts it where it is None.
        """
        if all(s.grad is None for b in self.buckets for s in b.shards):
            self._usage.clear()  # also where a step was left out
        elif self._consumed:
            self._note_stale_grads()
        self._consumed = False
        self._before_accumulation()

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
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if self._pending[id(bucket)].arrivals.missing > 0:
                return
            self._next += 1
            self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        """Start the reduction of what has accumulated; missing gradients count as zeros."""
        self._reductions.wait_sent()  # before there is more to hold
        pending = self._pending[id(bucket)]
        # The form and dtype are the same on all ranks, also on those without gradients for the bucket.
        source: GradBuffer | FreshGrads
        if self._deferred:
            source = pending.local or whole_buffer(bucket, self.policy.grad_dtype)
            if pending.fresh is not None:
                pending.fresh.add_to(source)
        else:
            source = pending.fresh or self._reductions.room_for(bucket)
        pending.local = pending.fresh = None
        self._reductions.start(bucket, source, last=self._is_last())

    def _is_last(self) -> bool:
        """Whether nothing more is known to come before the step. A number of backwards that was only learnt
        must not decide where a tree of sums ends.
        """
        known = self.policy.steps if self.policy.tree else self._learned_steps
        return self.reduction != "sharded" or (known is not None and self._backwards >= known)

    def end_backward(self) -> None:
        if not self._in_backward:
            return
        late = False
        if self._final:
            self._flush()
            self._late_flag.lower()
            late = any(p.fresh is not None for p in self._pending.values())
            if late:
                self._late_flag.raise_on(self._shards(), self.policy.grad_dtype)
        self.param_grads.are_reduced = self._final and not late and self._is_last()
        self._in_backward = False

    def _shards(self) -> list[Tensor]:
        return [s for b in self.buckets for s in b.shards]

    def abort(self) -> None:
        """A backward raised half-way: drop everything that has accumulated since the last step."""
        warnings.warn(
            "the previous backward did not finish; the gradients accumulated since the last step were dropped",
            stacklevel=2,
        )
        self.forget()

    def forget(self) -> None:
        """Drop every gradient since the last step, of values that are no longer there."""
        self._reductions.drop()
        self.param_grads.forget()
        self._in_backward = False
        self._drop()

    def _drop(self) -> None:
        """Forget what has accumulated, but not what a backward that runs has put on its parameters."""
        self._flag.lower()
        self._late_flag.lower()
        for bucket in self.buckets:
            self._pending[id(bucket)].clear()
            for shard in bucket.shards:
                shard.grad = None
        self._touched = self._deferred = False
        self._backwards = 0
        self._usage.clear()

    def _drop_late(self) -> None:
        """Forget what arrived after its bucket had left."""
        self._late_flag.lower()
        for pending in self._pending.values():
            pending.fresh = None

    def _flush(self) -> None:
        self._flag.lower()
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        self._next = len(self.buckets)
        self._deferred = False
        self._reductions.land_all(last=self._is_last())

    # --- boundary

    def finish(self) -> bool:
        """Reduce what still waits, so that the shards' gradients are complete; called before norms and steps.

        Returns:
            Whether gradients have arrived since the last call.
        """
        self.param_grads.adopt()
        self._notice_drop()
        if not self._touched:
            return False
        if self._deferred and self.reduction == "none":
            self._keep_own()
        elif self._deferred:
            self._next = 0
            self._flush()
        counts = self._reduce_late()
        self._reductions.complete()
        if self.policy.steps is None:
            self._learned_steps = self._backwards
        self._backwards = 0
        self._touched = False
        self._usage.drop_unused(counts)
        return True

    def _keep_own(self) -> None:
        """Give this rank's own gradients to the optimizer."""
        self._flag.lower()
        for bucket in self.buckets:
            pending = self._pending[id(bucket)]
            own = pending.local or whole_buffer(bucket, self.policy.grad_dtype)
            pending.local = None
            own.zero_missing()
            self._reductions.sums_of(bucket).add_own(own.tensor)
        self._deferred = False

    def _reduce_late(self) -> UsageCounts:
        """Count the users of every parameter, and reduce what arrived late on any rank, [Note: repeated arrivals]."""
        counts = self._usage.count([b for b in self.buckets if self._pending[id(b)].fresh is not None])
        for bucket in self.buckets:
            if id(bucket) in counts.flagged:
                self._launch(bucket)
        self._reductions.land_all(last=self._is_last())
        self._late_flag.lower()
        return counts

    @property
    def backwards(self) -> int:
        """Number of backwards since the last step that have brought gradients."""
        return self._backwards

    @property
    def accumulating(self) -> bool:
        """Whether a backward has left something for the next step, here or (once reduced) on any rank."""
        return self._touched or self._usage.any

    def stepped(self) -> None:
        """The optimizer has used the gradients; what counts as used starts anew."""
        self._usage.clear()
        self._consumed = True
        self.param_grads.stepped()

    def local_bytes(self) -> int:
        """Bytes of gradients that are held now besides the shards': whole fp32 sums of the local plan, and
        sums of micro-batches that wait for others.
        """
        held = [p.local.tensor for p in self._pending.values() if p.local is not None]
        held += self._reductions.waiting()
        return sum(t.numel() * t.element_size() for t in held)

    # --- looking on, for access by name

    def has_grad(self, param: Tensor, shard: Tensor) -> bool:
        """Whether this rank has a gradient for `param` that the next step would use."""
        self._notice_drop()
        return self._usage.has(param) if self._touched else shard.grad is not None

    def is_reduced(self, shard: Tensor) -> bool:
        """Whether an optimizer's entry has a gradient that came from a reduction."""
        return shard.grad is not None and not self._flag.is_on(shard)

    def keep(self, param: Tensor) -> None:
        """A gradient was written from outside: it counts, whether or not a backward has used `param`."""
        self._usage.add(param)

    def preview(self, bucket: Bucket) -> tuple[Tensor | None, Tensor]:
        """This rank's slice of what waits to be reduced, as it would come out (None if nothing waits on any rank),
        and of what has been reduced. Both stay as they are. Collective.

        Raises:
            ValueError: nobody but the optimizer reduces.
        """
        if self.reduction == "none":
            raise ValueError(
                'with reduction="none" every rank has gradients of its own: read .grad of the optimizer\'s entries'
            )
        pending = self._pending[id(bucket)]
        waits = self._deferred
        if not waits:
            [late] = sum_over_ranks([pending.fresh is not None], bucket.ranks, bucket.device)
            waits = late > 0
        if not waits:
            return None, self._reductions.sums_of(bucket).so_far()
        whole = whole_buffer(bucket, self.policy.grad_dtype)
        for part in (pending.local, pending.fresh):
            if part is not None:
                part.add_to(whole)
        whole.zero_missing()
        return self._reductions.tried(bucket, whole), self._reductions.sums_of(bucket).so_far()
