"""What happens around `optimizer.step()`: gradients complete before, parameters published after."""

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
from ds_zero.interfaces import FusedStep, SegmentStep, Work
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gradients.grad_scale import ShardGrads
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.profiler_ranges import span
from ds_zero.runtime.segment_sums import STEPPED, whole_sums
from ds_zero.runtime.storage import MASTER, PARAM, visit


class Stepper:
    """Wraps one optimizer's `step` by torch's own pre- and post-hooks.

    With an optimizer that has `step_fused` the pre-hook does the whole work bucket by bucket, so that each
    bucket is on the wire while the next one is computed; the optimizer's own body then finds no gradients and
    does nothing.

    [Note: step in sub-groups] A bucket of which masters or gradients are away is a sub-group of its own: it is stepped
    while the next one is being loaded and the last one stored. All other buckets that are not published are stepped in
    one call, since each call costs as much as a kernel on 100,000 elements.
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
    ) -> None:
        # The first modules of the model are in the last buckets: publish in the order in which forward will
        # read.
        self._buckets = [b for b in reversed(buckets) if b.trainable]
        self._comm, self._reducer, self._gatherer, self._overlap = comm, reducer, gatherer, overlap
        self._works: list[Work] = []
        self._publish_numel = publish_numel
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._entries: list[list[int]] = []
        self._grads = grads
        self.pending = grads.pending
        self._judge: Callable[[], bool] | None = None
        self._taken = True
        self._segment_sums: dict[int, Tensor] = {}
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
                "step(closure) would run forward and backward between reduction and update; call "
                "loss.backward() first, then step()"
            )
        _refuse_grad_scaler()
        self._check_entries(optimizer)
        self._reducer.finish()
        self._taken = self._judge is None or self._judge()
        self.wait()
        if not self._taken:
            self.forget()  # without gradients the optimizer's own body does nothing
        elif self.fused:
            assert isinstance(optimizer, FusedStep)
            self._step_fused(optimizer)
        else:
            self._prepare_plain()

    def ask(self, judge: Callable[[], bool]) -> None:
        """Ask `judge` once in every step, when gradients are complete, whether to take it. Every rank answers alike."""
        assert self._judge is None, "a step has one judge"
        self._judge = judge

    def clip(self, factor: Tensor) -> None:
        """Multiply the gradients on the shards by `factor` (0-dim fp32, CPU), at the latest in the next step."""
        pending = self.pending
        pending.clip = factor if pending.clip is None else factor * pending.clip
        if not self.fused:
            self.apply_pending()

    def apply_pending(self) -> None:
        """Make the gradients on the shards those that the optimizer shall see, [Note: units of a gradient]."""
        self._grads.apply()

    def _prepare_plain(self) -> None:
        """For an optimizer without `step_fused`: true gradients, in the dtype of the shards."""
        self.apply_pending()
        for bucket in self._buckets:
            for shard in bucket.shards:
                if shard.grad is not None and shard.grad.dtype != shard.dtype:
                    self._set_aside.append((shard, shard.grad))
                    shard.grad = shard.grad.to(shard.dtype)

    def forget(self) -> None:
        """Drop every gradient, and what was known of them."""
        self._reducer.forget()
        self.pending.reset()

    def _check_entries(self, optimizer: Optimizer) -> None:
        if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != self._entries:
            raise ValueError(
                "the optimizer's param_groups changed after ds_zero.shard (add_param_group?): new parameters "
                "have no shards. "
                "Add all parameters first, then shard; or ds_zero.destroy(model) and shard again"
            )

    def _step_fused(self, optimizer: FusedStep) -> None:
        scale = self.pending.factor()
        together: list[Bucket] = []
        with torch.no_grad():
            if isinstance(optimizer, SegmentStep):
                self._segment_sums = whole_sums(optimizer, self._buckets, scale)
            with closing(visit(self._buckets, STEPPED, write=(MASTER,))) as visited:
                for bucket in visited:
                    published = self._is_published(bucket)
                    if not published and not bucket.storage.is_away(*STEPPED, PARAM):
                        together.append(bucket)
                        continue
                    self._step_buckets(optimizer, [bucket], scale)
                    if bucket.storage.is_away(PARAM):
                        bucket.storage.refresh_param()
                    if published:  # on the wire while the next one is computed
                        self._start_publish(bucket)
            self._step_buckets(optimizer, together, scale)

    def _step_buckets(self, optimizer: FusedStep, buckets: list[Bucket], scale: Tensor) -> None:
        """One call for all shards that have a gradient, in the buckets' order."""
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
            optimizer.step_fused(live, grad_scale=scale, out=out)
        for shard in live:
            assert shard.grad is not None
            self._set_aside.append((shard, shard.grad))
            shard.grad = None

    def _after(self) -> None:
        for shard, grad in self._set_aside:
            shard.grad = grad
        self._set_aside.clear()
        self.pending.clip = self.pending.norm = None
        self._reducer.stepped()
        if not self._taken:
            return
        if not self.fused:
            self.publish()
        self._gatherer.drop_all()
        if not self._overlap:
            self.wait()

    # --- publishing

    def publish(self) -> None:
        """Make every rank's parameters equal to the masters, wherever those were changed."""
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.refresh_params()
                self._start_publish(bucket)

    def _is_published(self, bucket: Bucket) -> bool:
        """Whether ranks own different parts of values that every rank keeps whole."""
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
                    self._works[-3].wait()  # three messages hold memory at a time

    def _publish_part(self, columns: Tensor, ranks: Ranks) -> Work:
        """Gather the same range of every rank's slice; its own copy, since a message has to be contiguous."""
        whole = torch.empty(columns.shape, dtype=columns.dtype, device=columns.device)
        whole[ranks.rank].copy_(columns[ranks.rank])
        return Then([self._comm.gather(whole.view(-1), ranks)], _Spread(columns, whole))

    def wait(self) -> None:
        """Return when published parameters may be read."""
        works, self._works = self._works, []
        for work in works:
            work.wait()


class _Spread:
    """Copies an arrived message to its places, and lets go of it."""

    def __init__(self, columns: Tensor, whole: Tensor) -> None:
        self._columns, self._whole = columns, whole

    def __call__(self) -> None:
        with torch.no_grad():
            self._columns.copy_(self._whole)
        del self._columns, self._whole


def _refuse_grad_scaler() -> None:
    """Torch's scaler looks for infinities in one rank's shards only, so that ranks would disagree on skipping
    a step.
    """
    frame = sys._getframe(1)
    for _ in range(8):  # hooks and wrappers lie between the scaler and us
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            raise ValueError(
                "torch.amp.GradScaler decides about skipping a step from this rank's shards alone, so ranks "
                "would diverge. Use ds_zero's: scaler = ds_zero.LossScaler(model); "
                "scaler.scale(loss).backward(); optimizer.step(). Or train in bf16 "
                "(ZeroConfig(param_dtype=torch.bfloat16)), which needs no scaling"
            )
