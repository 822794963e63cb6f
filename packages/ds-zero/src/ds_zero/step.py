"""What happens around `optimizer.step()`: gradients complete before, parameters published after."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ds_zero.bucket import Bucket
from ds_zero.comm import Comm
from ds_zero.gather import Gatherer
from ds_zero.interfaces import FusedStep, Work
from ds_zero.ranks import Ranks
from ds_zero.reduce import Reducer


class Stepper:
    """Wraps one optimizer's `step` by torch's own pre- and post-hooks.

    With an optimizer that has `step_fused` the pre-hook does the whole work bucket by bucket, so that each
    bucket is on the wire while the next one is computed; the optimizer's own body then finds no gradients and
    does nothing.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        *,
        ranks: Ranks,
        comm: Comm,
        reducer: Reducer,
        gatherer: Gatherer,
        overlap: bool,
    ) -> None:
        # The first modules of the model are in the last buckets: publish in the order in which forward will
        # read.
        self._buckets = [b for b in reversed(buckets) if b.trainable]
        self._ranks, self._comm, self._reducer, self._gatherer, self._overlap = (
            ranks,
            comm,
            reducer,
            gatherer,
            overlap,
        )
        self._works: list[Work] = []
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._entries: list[list[int]] = []
        self.grad_scale: Tensor | None = None
        """Factor that the next fused step applies to every gradient: what clipping found."""
        self.fused = False

    def install(self, optimizer: Optimizer) -> list[RemovableHandle]:
        self.fused = isinstance(optimizer, FusedStep)
        self._entries = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        me = weakref.ref(self)

        def before(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stepper = me()
            if stepper is not None:
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
        if self._ranks.size > 1:
            _refuse_grad_scaler()
        self._check_entries(optimizer)
        if self._reducer.finish():
            self.grad_scale = None  # found for gradients that have changed since
        self.wait()
        if self.fused:
            assert isinstance(optimizer, FusedStep)
            self._step_fused(optimizer)

    def _check_entries(self, optimizer: Optimizer) -> None:
        if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != self._entries:
            raise ValueError(
                "the optimizer's param_groups changed after ds_zero.shard (add_param_group?): new parameters "
                "have no shards. "
                "Add all parameters first, then shard; or ds_zero.destroy(model) and shard again"
            )

    def _step_fused(self, optimizer: FusedStep) -> None:
        scale = self.grad_scale if self.grad_scale is not None else torch.ones((), dtype=torch.float32)
        with torch.no_grad():
            for bucket in self._buckets:
                live, out = [], []
                for shard, low in zip(bucket.shards, bucket.cut(bucket.low), strict=True):
                    if shard.grad is not None:
                        live.append(shard)
                        out.append(low if bucket.low is not bucket.master else None)
                if live:
                    optimizer.step_fused(live, grad_scale=scale, out=out)
                for shard in live:
                    assert shard.grad is not None
                    self._set_aside.append((shard, shard.grad))
                    shard.grad = None
                self._start_publish(bucket)

    def _after(self) -> None:
        for shard, grad in self._set_aside:
            shard.grad = grad
        self._set_aside.clear()
        self.grad_scale = None
        if not self.fused:
            self.publish()
        self._gatherer.drop_all()
        self._reducer.stepped()
        if not self._overlap:
            self.wait()

    # --- publishing

    def publish(self) -> None:
        """Make every rank's parameters equal to the masters, wherever those were changed."""
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.refresh_low()
                self._start_publish(bucket)

    def _start_publish(self, bucket: Bucket) -> None:
        if not bucket.whole or bucket.layout.num_owners == 1 or bucket.ranks.group is None:
            return
        with torch.profiler.record_function(f"ds.zero.publish/{bucket.layout.name}"):
            self._works.append(self._comm.gather(bucket.full, bucket.ranks, sizes=bucket.layout.slice_sizes))

    def wait(self) -> None:
        """Return when published parameters may be read."""
        works, self._works = self._works, []
        for work in works:
            work.wait()


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
                "would "
                "diverge: train in bf16 (ZeroConfig(param_dtype=torch.bfloat16)), which needs no scaling"
            )
