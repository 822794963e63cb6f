"""What happens around `optimizer.step()`: reductions are finished before it, updated parameters are published after it.

To publish is to all-gather the updated parameters of buckets that every rank keeps whole.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.works import Then
from ds_zero.interfaces import ChecksummedStep, FusedStep, SegmentStep, Work
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.checksums import NoChecksums
from ds_zero.runtime.early_step import NOT_FINITE, NoEarlySteps
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gradients.grad_scale import ShardGrads
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.profiler_ranges import span
from ds_zero.runtime.segment_sums import STEPPED, whole_sums
from ds_zero.runtime.staging import NUM_BUFFERS
from ds_zero.runtime.storage import MASTER, PARAM, visit


class Stepper:
    """Wraps one optimizer's `step` by torch's own pre- and post-hooks.

    With an optimizer that has `step_fused`, the pre-hook updates bucket by bucket, and each bucket is published while
    the next one is updated. It removes the gradients, so that the optimizer's own `step` does nothing.

    [Note: step in sub-groups]
    A bucket whose masters or gradients are away is updated by a separate call, while the tensors of the next such
    bucket are loaded and those of the previous one are stored. A bucket that is published is also updated by a separate
    call. All others are updated in one call, because the overhead of a call equals the time of a kernel on 100,000
    elements.
    With checksums, all buckets are updated before the first one is published, because what was read is compared in
    between, [Note: checksums of shards].
    """

    def __init__(
        self,
        buckets: list[Bucket],
        *,
        comm: Comm,
        reducer: Reducer,
        grads: ShardGrads,
        gatherer: Gatherer,
        overlap: bool,
        publish_numel: int | None = None,
        checksums: NoChecksums,
        early: NoEarlySteps,
    ) -> None:
        # The first modules of the model are in the last buckets: publish in the order in which forward reads. The last
        # gradients of a backward, which are theirs, are then stepped while they are still in staging buffers. If the
        # masters are the parameters and away, the other way round: those of the first modules are still in buffers when
        # the next forward begins, which then does not wait for a disk. As many bytes are loaded.
        last = any(b.storage.is_away(PARAM) and not b.storage.masters_apart for b in buckets if b.trainable)
        self._buckets = [b for b in (buckets if last else reversed(buckets)) if b.trainable]
        self._comm, self._reducer, self._gatherer, self._overlap = comm, reducer, gatherer, overlap
        self._works: list[Work] = []
        self._publish_numel = publish_numel
        self._checksums, self._early = checksums, early
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._entries: list[list[int]] = []
        self._grads = grads
        self.pending = grads.pending
        self._condition: Callable[[], bool] | None = None
        self._takes_step = True
        self._segment_sums: dict[int, Tensor] = {}
        self._first_away = [b for b in self._buckets if b.storage.is_away(MASTER)][: NUM_BUFFERS - 1]
        self.fused = False

    def install(self, optimizer: Optimizer) -> list[RemovableHandle]:
        self.fused = isinstance(optimizer, FusedStep)
        self._entries = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        me = weakref.ref(self)

        def before(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stepper = me()
            if stepper is not None:
                with stepper._comm.guard("optimizer.step()"):
                    stepper._before(opt, args, kwargs)

        def after(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stepper = me()
            if stepper is not None:
                stepper._after()

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise ValueError(
                "step(closure) is not supported, because it would run forward and backward between the reduction of "
                "gradients and the update: call loss.backward() first, then step()"
            )
        _refuse_grad_scaler()
        self._check_entries(optimizer)
        self._reducer.finish()
        self._takes_step = self._condition is None or self._condition()
        self.wait()
        if not self._takes_step:
            self._early.withdraw(NOT_FINITE)
            self.forget()  # without gradients the optimizer's own step does nothing
        elif self.fused:
            assert isinstance(optimizer, FusedStep)
            self._step_fused(optimizer)
        else:
            self._prepare_plain()

    def end_backward(self) -> None:
        """Called when a backward has ended. Starts to load the masters that the step needs first, if it is expected now
        and no bucket was updated before it.
        """
        if self.fused and not self._early.in_progress and self._reducer.ends_step:
            for bucket in self._first_away:
                bucket.storage.prefetch((MASTER,))

    def step_if(self, condition: Callable[[], bool]) -> None:
        """Makes every step depend on `condition`, which is called once per step after the gradients were reduced. It
        must return the same on every rank. If it returns False, the gradients are dropped and nothing is updated.
        """
        assert self._condition is None, "a stepper has at most one condition"
        self._condition = condition

    def clip(self, factor: Tensor) -> None:
        """Multiplies the gradients on the shards by `factor` (0-dim fp32, CPU), now or during the next step."""
        pending = self.pending
        pending.clip = factor if pending.clip is None else factor * pending.clip
        if not self.fused:
            self.apply_pending()

    def apply_pending(self) -> None:
        """Unscales and clips the gradients on the shards in place, [Note: units of a gradient]."""
        self._checksums.before_grads_change()
        self._grads.apply()
        self._checksums.grads_arrived()

    def _prepare_plain(self) -> None:
        """Gives an optimizer without `step_fused` unscaled, clipped gradients in the dtype of the shards."""
        self._checksums.before_step()
        self._checksums.require_equal()
        self._grads.apply()
        for bucket in self._buckets:
            for shard in bucket.shards:
                if shard.grad is not None and shard.grad.dtype != shard.dtype:
                    self._set_aside.append((shard, shard.grad))
                    shard.grad = shard.grad.to(shard.dtype)

    def forget(self) -> None:
        """Drops all gradients, their norm, and their pending factors."""
        self._reducer.forget()
        self.pending.reset()

    def _check_entries(self, optimizer: Optimizer) -> None:
        if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != self._entries:
            raise ValueError(
                "the optimizer's param_groups changed after ds_zero.shard (by add_param_group?): new parameters have "
                "no shards. Add all parameters before ds_zero.shard, or call ds_zero.destroy(model) and shard again"
            )

    def _step_fused(self, optimizer: FusedStep) -> None:
        scale = self.pending.factor()
        together: list[Bucket] = []
        apart = isinstance(optimizer, SegmentStep) or not isinstance(optimizer, ChecksummedStep)
        with torch.no_grad():
            if apart:
                self._checksums.before_step()
            if isinstance(optimizer, SegmentStep):
                self._segment_sums = whole_sums(optimizer, self._buckets, scale)
            stepped = self._early.settle(scale)
            others = [b for b in self._buckets if id(b) not in stepped]
            with closing(visit(others, STEPPED, write=(MASTER,))) as visited:
                for bucket in self._buckets:
                    published = self._is_published(bucket) and not self._checksums.enabled
                    if id(bucket) in stepped:
                        self._take_over(bucket, stepped[id(bucket)])
                    else:
                        next(visited)
                        if not published and not bucket.storage.is_away(*STEPPED, PARAM):
                            together.append(bucket)
                            continue
                        self._step_buckets(optimizer, [bucket], scale)
                        if bucket.storage.is_away(PARAM):
                            bucket.storage.refresh_param()
                    if published:  # sent while the next bucket is updated
                        self._start_publish(bucket)
                next(visited, None)  # ends the last visit
            self._step_buckets(optimizer, together, scale)
            if self._checksums.enabled:
                if apart:
                    self._checksums.after_step()
                self._checksums.require_equal()
                for bucket in self._buckets:
                    self._start_publish(bucket)

    def _step_buckets(self, optimizer: FusedStep, buckets: list[Bucket], scale: Tensor) -> None:
        """Updates all shards of `buckets` that have a gradient by one call, in the order of the buckets."""
        live: list[Tensor] = []
        out: list[Tensor | None] = []
        for bucket in buckets:
            for shard, copy in zip(bucket.shards, bucket.storage.copies, strict=True):
                if shard.grad is not None:
                    live.append(shard)
                    out.append(copy)
        if live and isinstance(optimizer, SegmentStep):
            sums = torch.stack([self._segment_sums[id(shard)] for shard in live])
            optimizer.step_segments(live, sums, out=out)
        elif live:
            self._checksums.step_fused(optimizer, live, scale, out)
        for shard in live:
            assert shard.grad is not None
            self._set_aside.append((shard, shard.grad))
            shard.grad = None

    def _take_over(self, bucket: Bucket, new: Tensor | None) -> None:
        """Completes the step of a bucket that was updated during the backward, [Note: early steps].

        Args:
            new: its new parameters, if they were kept apart.
        """
        if new is not None:
            with bucket.storage.opened(PARAM, write=True, load=False) as param:
                param.copy_(new)
        for shard in bucket.shards:
            if shard.grad is not None:
                self._set_aside.append((shard, shard.grad))
                shard.grad = None

    def _after(self) -> None:
        for shard, grad in self._set_aside:
            shard.grad = grad
        self._set_aside.clear()
        self.pending.clip = self.pending.norm = None
        self._reducer.stepped()
        if not self._takes_step:
            return
        if not self.fused:
            self._checksums.after_step()
            self.publish()
        self._gatherer.drop_all()
        if not self._overlap:
            self.wait()

    # --- publishing

    def publish(self) -> None:
        """Starts to update every rank's parameters from the masters, which may have been changed on any rank."""
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.refresh_params()
                self._start_publish(bucket)

    def _is_published(self, bucket: Bucket) -> bool:
        """Whether ranks own different parts of a bucket that every rank keeps whole."""
        return bucket.whole and bucket.layout.num_owners > 1 and bucket.ranks.group is not None

    def _start_publish(self, bucket: Bucket) -> None:
        if not self._is_published(bucket):
            return
        layout, numel = bucket.layout, self._publish_numel
        with span(f"ds.zero.publish/{layout.name}"):
            if numel is None or numel >= layout.padded_numel or layout.undivided:
                self._works.append(self._comm.gather(bucket.full, bucket.ranks, sizes=layout.slice_sizes))
                return
            part = max(1, numel // bucket.ranks.size)
            slices = bucket.full.view(bucket.ranks.size, -1)
            for begin in range(0, slices.shape[1], part):
                self._works.append(self._publish_part(slices[:, begin : begin + part], bucket.ranks))
                if begin >= 2 * part:
                    self._works[-3].wait()  # so that at most three messages exist at a time

    def _publish_part(self, columns: Tensor, ranks: Ranks) -> Work:
        """Starts to gather the same range of every rank's slice.

        Args:
            columns: (ranks, numel of the range), a view of the bucket. The gather uses a copy of it, because a message
                must be contiguous.
        """
        message = torch.empty(columns.shape, dtype=columns.dtype, device=columns.device)
        message[ranks.rank].copy_(columns[ranks.rank])
        return Then([self._comm.gather(message.view(-1), ranks)], _CopyBack(columns, message))

    def settle(self) -> None:
        """Waits for updated parameters, and takes updates for a step that has not been called back, because masters or
        states are going to be read or written, [Note: early steps].
        """
        self._early.withdraw()
        self.wait()

    def wait(self) -> None:
        """Waits until published parameters may be read."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        if works:
            self._checksums.published()


class _CopyBack:
    """Copies a received message into the bucket, and frees it."""

    def __init__(self, columns: Tensor, message: Tensor) -> None:
        self._columns, self._message = columns, message

    def __call__(self) -> None:
        with torch.no_grad():
            self._columns.copy_(self._message)
        del self._columns, self._message


def _refuse_grad_scaler() -> None:
    """Raises if `torch.amp.GradScaler` called the step. It looks for infinities in one rank's shards only, so ranks
    could disagree on whether to skip a step.
    """
    frame = sys._getframe(1)
    for _ in range(8):  # there are frames of hooks and wrappers between the scaler and this function
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            raise ValueError(
                "torch.amp.GradScaler decides from this rank's shards alone whether to skip a step, so ranks "
                "would diverge. Use the scaler of ds_zero instead: scaler = ds_zero.LossScaler(model); "
                "scaler.scale(loss).backward(); optimizer.step(). Or train in bf16 "
                "(ZeroConfig(param_dtype=torch.bfloat16)), which needs no loss scale"
            )
