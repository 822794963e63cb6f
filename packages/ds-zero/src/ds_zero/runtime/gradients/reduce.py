"""Takes gradients as backward computes them, reduces them bucket by bucket, and adds the results to `shard.grad` of the
optimizer's shards.

[Note: two accumulation plans]
local    Each micro-batch except the last adds its gradients to a buffer of the whole bucket on each rank, in
         `ZeroConfig.grad_dtype` (fp32 by default). The sums are reduced once, at the accumulation boundary.
sharded  Each micro-batch is reduced, and each rank adds its slice of the result to its shard's gradient.

Without accumulation both plans send the gradients in their own dtype.

[Note: launch order]
All ranks must start the same reductions in the same order. Buckets are numbered in the order in which
backward completes them (the reverse of registration). The reduction of bucket k starts only after that of bucket k-1,
whatever order the gradients arrive in. A bucket that is incomplete at the end of backward is filled with zeros and
reduced then. So a parameter that one rank did not use delays a reduction, but the messages of ranks always match.

[Note: repeated arrivals]
Autograd accumulates the gradient of a parameter once for each backward that reaches it. Reentrant activation
checkpoints run inner backwards inside the outer one. The gradient of a parameter that k checkpoints use arrives k
times, or k + 1 times if it is also used outside of them. The number is not known beforehand, and ranks may differ in
it. So the reducer counts the arrivals of each parameter and remembers the largest number in one backward. A bucket is
complete when every parameter has arrived that often. These numbers decide only when a rank starts a reduction, never in
which order, so ranks need not agree on them.
A gradient that arrives after the reduction of its bucket has started, as in the first backward, stays unreduced on its
rank until the bucket's next reduction. At the accumulation boundary, the message that counts the ranks that use each
parameter also tells which buckets have such late gradients on any rank. All ranks reduce these buckets once more.
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
from ds_zero.runtime.checksums import NoChecksums
from ds_zero.runtime.early_step import NoEarlySteps
from ds_zero.runtime.gradients.arrivals import Arrivals, Pending
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
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
        checksums: NoChecksums,
        norms: ArrivedNorms,
        early: NoEarlySteps,
    ) -> None:
        """`before_accumulation` is called at the start of the first backward after the gradients of the shards were
        completed by `finish`.
        """
        self.buckets = [b for b in buckets if b.trainable]
        self.policy = policy
        self._comm = comm
        self.param_grads = param_grads
        self.sync_depth = 0
        """Number of open `no_sync` contexts."""
        self.requires_sync = True
        """Whether backwards outside of `no_sync` are reduced."""
        self._learned_steps = policy.steps
        self._before_accumulation = before_accumulation
        self._checksums, self._early = checksums, early
        self._watch = watch
        self._pending = {id(b): Pending(Arrivals(len(b.params))) for b in self.buckets}
        self._reductions = Reductions(self.buckets, comm, policy, norms, early)
        self._next = 0
        """Index of the first bucket whose reduction has not started in the present backward."""
        self._backwards = 0
        self._in_backward = False
        self._final = False
        self._deferred = False
        """Whether a backward since the last reduction was not reduced. The next reduction then sends sums in
        `grad_dtype` on every rank, also for buckets whose parameters the rank did not use."""
        self._flag = Flag()
        """[Note: dropped unreduced gradients]"""
        self._late_flag = Flag()
        """The same for gradients that arrived after the reduction of their bucket had started."""
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
        """Changes `reduction`, between a step and the next backward."""
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"reduction={reduction!r}: it must be one of {', '.join(map(repr, get_args(Reduction)))}"
            )
        self._notice_drop()
        unused = not self._consumed and any(s.grad is not None for s in self._shards())
        if self._touched or unused:
            raise ValueError(
                f"reduction={reduction!r} between a backward and its step: the gradients of that backward are reduced "
                f"by {self.reduction!r}. Change it after optimizer.step() or optimizer.zero_grad()"
            )
        if reduction == "none":
            require_whole_grads(self.buckets)
        self.policy = replace(self.policy, reduction=reduction)

    # --- hooks

    def install(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Registers a hook on every trainable parameter that has none yet. The hooks do not keep this object alive.

        Also called before every forward, because a hook cannot be registered on a frozen parameter, which may become
        trainable later.
        """
        trainable = [p for p in self._unwatched if p.requires_grad]
        if not trainable:
            return []
        self._unwatched = [p for p in self._unwatched if not p.requires_grad]
        me = weakref.ref(self)

        def on_grad(param: nn.Parameter) -> None:
            reducer = me()
            if reducer is not None:
                with reducer._comm.guard("the reduction of gradients"):
                    reducer._arrive(param)

        return [p.register_post_accumulate_grad_hook(on_grad) for p in trainable]

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
                    pending.fresh = self._reductions.buffer_for(bucket)
                pending.fresh.add(index, grad)
        self._usage.add(param)
        pending.arrivals.count(index)
        if self._final:
            self._launch_ready()

    def _begin_backward(self) -> None:
        if self._in_backward:
            return
        self._early.withdraw("another backward came before the step")
        self._checksums.before_grads_change()
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
        self._early.begin_backward(is_last=self.ends_step, used=self._usage.has)
        self._watch.arm()

    def _notice_drop(self) -> None:
        """Drops unreduced gradients if `zero_grad` was called, [Note: dropped unreduced gradients]."""
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

    @property
    def ends_step(self) -> bool:
        """Whether the present backward is reduced and expected to be the last one before the step. If the number of
        backwards is unknown, `no_sync` for the earlier ones tells.
        """
        if not self._final:
            return False
        known = self.policy.steps if self.policy.steps is not None else self._learned_steps
        return self._deferred if known is None else self._backwards >= known

    def _begin_accumulation(self) -> None:
        """Called at the start of the first backward after the gradients of the shards were completed. This backward
        adds to `shard.grad`, or sets it if it is None.
        """
        if all(s.grad is None for b in self.buckets for s in b.shards):
            self._usage.clear()  # also after a skipped step
        elif self._consumed:
            self._note_stale_grads()
        self._consumed = False
        self._before_accumulation()

    def _note_stale_grads(self) -> None:
        """Warns if the gradients were not cleared after a step.

        torch permits this. In a sharded loop the cause is almost always a call of `model.zero_grad()`, which does not
        clear the gradients of the shards.
        """
        first = next((s.grad for b in self.buckets for s in b.shards if s.grad is not None), None)
        if first is None or not first.any():
            return
        warnings.warn(
            "the gradients of the previous step have not been cleared, so that new ones will be added to them: call "
            "optimizer.zero_grad() after every step (model.zero_grad() does not clear the gradients of shards)",
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
        """Starts the reduction of the bucket's unreduced gradients; missing gradients count as zeros."""
        self._reductions.wait_sent()  # frees the previous bucket's gradients first
        pending = self._pending[id(bucket)]
        # All ranks must send the same dtype and shapes, also those without gradients for the bucket.
        source: GradBuffer | FreshGrads
        if self._deferred:
            source = pending.local or whole_buffer(bucket, self.policy.grad_dtype)
            if pending.fresh is not None:
                pending.fresh.add_to(source)
        else:
            source = pending.fresh or self._reductions.buffer_for(bucket)
        pending.local = pending.fresh = None
        self._reductions.start(bucket, source, last=self._is_last())

    def _is_last(self) -> bool | None:
        """Whether this is expected to be the last backward before the step; None if nothing is known. For a tree of
        sums, a number of backwards that was only observed is not relied on.
        """
        if self.reduction != "sharded":
            return True
        known = self.policy.steps if self.policy.tree else self._learned_steps
        return None if known is None else self._backwards >= known

    def end_backward(self) -> None:
        if not self._in_backward:
            return
        late = False
        if self._final:
            with self._comm.guard("the reduction of gradients"):
                self._flush()
            self._late_flag.lower()
            late = any(p.fresh is not None for p in self._pending.values())
            if late:
                self._late_flag.raise_on(self._shards(), self.policy.grad_dtype)
            self._checksums.grads_arrived()
        self.param_grads.are_reduced = self._final and not late and bool(self._is_last())
        self._in_backward = False

    def _shards(self) -> list[Tensor]:
        return [s for b in self.buckets for s in b.shards]

    def abort(self) -> None:
        """Drops all gradients since the last step, after a backward that raised."""
        warnings.warn(
            "the previous backward did not finish; the gradients accumulated since the last step were dropped",
            stacklevel=2,
        )
        self.forget()

    def forget(self) -> None:
        """Drops all gradients since the last step, and cancels reductions in progress."""
        self._reductions.drop()
        self.param_grads.forget()
        self._in_backward = False
        self._drop()

    def _drop(self) -> None:
        """Drops the accumulated gradients, but not those that a running backward has stored in `param.grad`."""
        self._early.withdraw("the gradients were dropped")
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
        """Drops gradients that arrived after the reduction of their bucket had started."""
        self._late_flag.lower()
        for pending in self._pending.values():
            pending.fresh = None

    def _flush(self) -> None:
        self._flag.lower()
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        self._next = len(self.buckets)
        self._deferred = False
        self._reductions.finish_all(last=self._is_last())
        self._reductions.end_arrivals()

    # --- boundary

    def finish(self) -> bool:
        """Reduces all unreduced gradients, so that the shards' gradients are complete. Called before norms and steps.

        Returns:
            Whether a backward has computed gradients since the last call.
        """
        self.param_grads.adopt()
        self._notice_drop()
        if not self._touched:
            return False
        if self._deferred or not self._reductions.are_complete:
            self._checksums.before_grads_change()
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
        self._checksums.grads_arrived()
        return True

    def _keep_own(self) -> None:
        """Adds this rank's gradients to those of the shards without a reduction."""
        self._flag.lower()
        for bucket in self.buckets:
            pending = self._pending[id(bucket)]
            own = pending.local or whole_buffer(bucket, self.policy.grad_dtype)
            pending.local = None
            own.zero_missing()
            self._reductions.sums_of(bucket).add_own(own.tensor)
        self._deferred = False

    def _reduce_late(self) -> UsageCounts:
        """Counts the ranks that use each parameter, and reduces the buckets with late gradients on any rank, [Note:
        repeated arrivals].
        """
        counts = self._usage.count([b for b in self.buckets if self._pending[id(b)].fresh is not None])
        for bucket in self.buckets:
            if id(bucket) in counts.flagged:
                self._launch(bucket)
        self._reductions.finish_all(last=self._is_last())
        self._late_flag.lower()
        return counts

    @property
    def backwards(self) -> int:
        """Number of backwards since the last step that computed gradients of this model."""
        return self._backwards

    @property
    def accumulating(self) -> bool:
        """Whether there are gradients for the next step: on this rank, or, after the reduction, on any rank."""
        return self._touched or self._usage.any

    def stepped(self) -> None:
        """Called after a step has used the gradients."""
        self._usage.clear()
        self._consumed = True
        self.param_grads.stepped()

    def local_bytes(self) -> int:
        """Bytes of gradients in memory now, without those of the shards: the whole sums of the local plan, and the
        partial sums of [Note: tree over micro-batches].
        """
        held = [p.local.tensor for p in self._pending.values() if p.local is not None]
        held += self._reductions.partial_sums()
        return sum(t.numel() * t.element_size() for t in held)

    # --- read access to gradients by name

    def has_grad(self, param: Tensor, shard: Tensor) -> bool:
        """Whether this rank has a gradient for `param` that the next step would use."""
        self._notice_drop()
        return self._usage.has(param) if self._touched else shard.grad is not None

    def is_reduced(self, shard: Tensor) -> bool:
        """Whether `shard.grad` is a reduced gradient."""
        return shard.grad is not None and not self._flag.is_on(shard)

    def keep(self, param: Tensor) -> None:
        """Treats `param` as used, since its gradient was written by the user."""
        self._usage.add(param)

    def preview(self, bucket: Bucket) -> tuple[Tensor | None, Tensor]:
        """Returns this rank's slice of the reduction of the unreduced gradients (None if no rank has any), and its
        slice of the gradients reduced so far. Changes neither. Collective.

        Raises:
            ValueError: the reduction is "none".
        """
        if self.reduction == "none":
            raise ValueError(
                'with reduction="none" every rank has gradients of its own: read .grad of the optimizer\'s entries '
                "instead"
            )
        pending = self._pending[id(bucket)]
        unreduced = self._deferred
        if not unreduced:
            [late] = sum_over_ranks([pending.fresh is not None], bucket.ranks, bucket.device)
            unreduced = late > 0
        if not unreduced:
            return None, self._reductions.sums_of(bucket).so_far()
        whole = whole_buffer(bucket, self.policy.grad_dtype)
        for part in (pending.local, pending.fresh):
            if part is not None:
                part.add_to(whole)
        whole.zero_missing()
        return self._reductions.reduced(bucket, whole), self._reductions.sums_of(bucket).so_far()
