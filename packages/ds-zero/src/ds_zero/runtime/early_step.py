"""Updates buckets during the last backward before a step, and takes the updates back if the step would differ.

[Note: early steps]
A step needs the norm of all gradients: for the factor of clipping, and to find overflows. Both are usually absent, so
that the factor is known before the backward. So a bucket whose gradient is final is updated at once with the expected
factor, while the backward goes on. The step compares what it would use with what was used: factor, options of the
optimizer, gradients, and the parameters that have one. If all are equal, the updates become final. Otherwise all of
them are taken back, and the step is executed as usual. So both ways have the same bits.

Nothing that a forward or backward reads changes before the step. Masters that are away, and parameters that are away,
are stored beside their old values. Of masters and states in memory, the optimizer copies the old values. New parameters
whose old ones are in memory are kept apart. The bytes of both kinds of copies are limited: buckets for which no bytes
are left are updated in the step. So are buckets in fp32, whose masters are the parameters.

After an update was taken back, the next steps are executed as usual: 1, then 2, 4, ... up to 32.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_zero.interfaces import SegmentStep, UndoableStep
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.grad_scale import Pending
from ds_zero.runtime.storage import GRAD, MASTER, PARAM, Reserved

_LONGEST_PAUSE = 32

OWN_MASTERS = "its masters are the parameters that the backward reads (fp32)"
NO_ROOM = "the memory for old and new values (undo_bytes) is used up"
UNUSED = "a parameter has no gradient on this rank"
CLIPPED = "the gradients were clipped, or the loss scale changed"
NOT_FINITE = "the gradient was not finite"
OPTIONS = "options of the optimizer, such as the learning rate, changed after the backward"
WRITTEN = "gradients were written or removed after the backward"
NOT_IN_MEMORY = "its gradient was not complete in memory when it arrived"


@dataclass(kw_only=True)
class StepOverlap:
    """How often steps overlapped with the backward, on this rank."""

    steps: int = 0
    """Number of steps since the model was sharded."""
    kept: int = 0
    """Number of steps of which a part was executed during the backward."""
    taken_back: int = 0
    """Number of backwards whose updates were taken back."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why they were: reason -> number of backwards."""
    buckets: int = 0
    """Number of buckets that the last step has updated during the backward."""
    waited: Counter[str] = field(default_factory=Counter)
    """Why others waited for the last step: reason -> number of buckets."""
    undo_bytes: int = 0
    """Bytes of copies of old and new values in memory, at most."""
    refused: str = ""
    """Why no step overlaps at all; empty if steps may."""


class NoEarlySteps:
    """`EarlySteps` that are off."""

    enabled = False
    in_progress = False
    """Whether a bucket was updated for the next step."""

    def __init__(self) -> None:
        self.report = StepOverlap(refused="ZeroConfig(overlap_step) is False")

    def attach(self, optimizer: Optimizer) -> None:
        """Uses this optimizer from now on."""

    def begin_backward(self, *, is_last: bool, used: Callable[[Tensor], bool]) -> None:
        """Called at the beginning of every backward, after `withdraw`.

        Args:
            is_last: whether it is expected to be the last one before a step.
            used: whether a parameter has had a gradient on this rank.
        """

    def arrived(self, bucket: Bucket, values: Tensor | None) -> None:
        """Called when a bucket's gradient is expected to be final. Updates the bucket, if possible.

        Args:
            values: the gradient over the rank's owned range, in memory; None if it is not in memory.
        """

    def end_arrivals(self) -> None:
        """Called when all gradients of a backward have arrived."""

    def withdraw(self, reason: str = "values were read or written before the step") -> None:
        """Takes all updates back, because something else than the step follows."""

    def settle(self, scale: Tensor) -> Mapping[int, Tensor | None]:
        """Called by a step, which multiplies gradients by `scale`. Makes the updates final, or takes them back.

        Returns:
            `id` of each bucket that was updated -> its new parameters, if they must be copied to the stored ones.
        """
        return {}


@dataclass(frozen=True)
class _Stepped:
    """A bucket that was updated."""

    bucket: Bucket
    stamp: tuple[int, ...]
    """`Resting.stamp` of its gradient."""
    new: Tensor | None
    """New parameters that were kept apart."""


class EarlySteps(NoEarlySteps):
    """Updates buckets during the backward, [Note: early steps]."""

    enabled = True

    def __init__(
        self, buckets: Sequence[Bucket], reserved: Reserved, pending: Pending, limit_bytes: int | None
    ) -> None:
        """
        Args:
            limit_bytes: maximum bytes of copies in memory; None: no limit.
        """
        super().__init__()
        self.report.refused = "the optimizer is not known yet"
        self._buckets = [b for b in buckets if b.trainable]
        self._pending, self._limit = pending, limit_bytes
        self._reserved, self._has_second = reserved, False
        self._optimizer: weakref.ref[Any] | None = None
        self._factor: Tensor | None = None
        """The factor of the updates; None: no bucket may be updated now."""
        self._options: list[dict[str, Any]] = []
        self._used: Callable[[Tensor], bool] = lambda _: False
        self._stepped: dict[int, _Stepped] = {}
        self._ahead: Bucket | None = None
        """The bucket whose masters were prefetched last."""
        self._room: dict[int, Tensor] = {}
        """Memory for new parameters, by `id` of the bucket."""
        self._log_bytes = 0
        self._waited: Counter[str] = Counter()
        self._pause, self._last_pause = 0, 0
        """Number of steps that are executed as usual from now on, and what it was set to last."""

    @property
    def in_progress(self) -> bool:  # type: ignore[override]
        return bool(self._stepped)

    def attach(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.report.refused = _refusal(optimizer)

    def _able(self) -> UndoableStep | None:
        if self.report.refused or self._optimizer is None:
            return None
        optimizer: UndoableStep | None = self._optimizer()
        return optimizer

    def begin_backward(self, *, is_last: bool, used: Callable[[Tensor], bool]) -> None:
        self._factor = None
        optimizer = self._able()
        if not is_last or optimizer is None or self._pause:
            return
        self._factor, self._used = self._pending.factor(), used
        self._options = _options_of(optimizer)
        self._log_bytes = 0
        self._waited.clear()
        if not self._has_second:
            self._has_second = True
            self._reserved.reserve_second(
                [
                    key
                    for b in self._buckets
                    if b.storage.masters_apart
                    for key in b.storage.away
                    if key.kind != GRAD
                ]
            )
        self._prefetch(0)

    def arrived(self, bucket: Bucket, values: Tensor | None) -> None:
        optimizer = self._able()
        if self._factor is None or optimizer is None or id(bucket) in self._stepped:
            return
        entries = [shard for shard in bucket.shards if shard.numel()]
        obstacle = self._obstacle(bucket, entries, values)
        num_bytes = 0
        if not obstacle:
            num_bytes = self._bytes_for(optimizer, bucket, entries)
            if self._limit is not None and self._log_bytes + num_bytes > self._limit:
                obstacle = NO_ROOM
        if obstacle:
            self._waited[obstacle] += 1
            return
        assert values is not None
        self._log_bytes += num_bytes
        self.report.undo_bytes = max(self.report.undo_bytes, self._log_bytes)
        if entries:
            self._step(optimizer, bucket, entries, values)
        index = next(i for i, b in enumerate(self._buckets) if b is bucket)
        self._prefetch(index + 1)

    def _obstacle(self, bucket: Bucket, entries: Sequence[Tensor], values: Tensor | None) -> str:
        """Returns why a bucket cannot be updated now; empty if it can."""
        if not bucket.storage.masters_apart:
            return OWN_MASTERS
        if values is None:
            return NOT_IN_MEMORY
        own = zip(bucket.shards, bucket.params, strict=True)
        if not all(self._used(param) for shard, param in own if shard.numel()):
            return UNUSED
        return "" if all(shard.grad is not None for shard in entries) else UNUSED

    def _bytes_for(self, optimizer: UndoableStep, bucket: Bucket, entries: Sequence[Tensor]) -> int:
        storage = bucket.storage
        param = storage.addressable(PARAM)
        log = optimizer.undo_bytes(entries, with_values=not storage.is_away(MASTER))
        return log + (param.nbytes if param is not None else 0)

    def _step(
        self, optimizer: UndoableStep, bucket: Bucket, entries: Sequence[Tensor], values: Tensor
    ) -> None:
        assert self._factor is not None
        storage = bucket.storage
        master, param, grad = storage.rest(MASTER), storage.rest(PARAM), storage.rest(GRAD)
        kept_apart = None
        # Noted before anything changes, so that an error in between is taken back, too.
        if param.tensor is not None:
            kept_apart = self._room_for(bucket, param.tensor)
        self._stepped[id(bucket)] = _Stepped(bucket, grad.stamp(), kept_apart)
        with torch.no_grad(), ExitStack() as opened:
            opened.enter_context(grad.showing(values))
            for rest in (master, param):
                rest.begin_tentative()
            opened.enter_context(master.opened(write=True))
            if kept_apart is not None:
                new = kept_apart
            else:
                new = opened.enter_context(param.opened(write=True, load=False))
            copies = [c for s, c in zip(bucket.shards, storage.cut(new), strict=True) if s.numel()]
            optimizer.step_undoable(
                entries, grad_scale=self._factor, out=copies, with_values=master.tensor is not None
            )

    def _room_for(self, bucket: Bucket, param: Tensor) -> Tensor:
        room = self._room.get(id(bucket))
        if room is None:
            pinned = param.device.type != "cpu"
            room = self._room[id(bucket)] = torch.empty(param.shape, dtype=param.dtype, pin_memory=pinned)
        return room

    def _prefetch(self, index: int) -> None:
        """Starts to load the masters of a bucket, which will be updated soon."""
        if index < len(self._buckets) and self._buckets[index].storage.masters_apart:
            self._ahead = self._buckets[index]
            self._ahead.storage.prefetch((MASTER,))

    def end_arrivals(self) -> None:
        for key, one in self._stepped.items():  # tensors in one memory share a version
            self._stepped[key] = replace(one, stamp=one.bucket.storage.rest(GRAD).stamp())

    def withdraw(self, reason: str = "values were read or written before the step") -> None:
        self._factor = None
        if not self._stepped:
            return
        stepped, self._stepped = self._stepped, {}
        optimizer = self._able()
        if optimizer is not None:
            optimizer.rollback()
        for one in stepped.values():
            for kind in (MASTER, PARAM):
                one.bucket.storage.rest(kind).revert()
        self.report.taken_back += 1
        self.report.reasons[reason] += 1

    def settle(self, scale: Tensor) -> Mapping[int, Tensor | None]:
        self.report.steps += 1
        self._pause = max(0, self._pause - 1)
        self.report.waited = Counter(self._waited)
        self._waited.clear()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.storage.abandon((MASTER,))
        reason = self._difference(scale) if self._stepped else ""
        if reason:
            self.withdraw(reason)
            self._pause = self._last_pause = min(max(1, 2 * self._last_pause), _LONGEST_PAUSE)
        stepped, self._stepped, self._factor = self._stepped, {}, None
        self.report.buckets = len(stepped)
        if not stepped:
            return {}
        optimizer = self._able()
        assert optimizer is not None
        optimizer.commit()
        for one in stepped.values():
            for kind in (MASTER, PARAM):
                one.bucket.storage.rest(kind).keep()
        self.report.kept += 1
        self._last_pause = 0
        return {key: one.new for key, one in stepped.items()}

    def _difference(self, scale: Tensor) -> str:
        """Returns how the step differs from the updates; empty if it does not."""
        optimizer = self._able()
        if optimizer is None or self._factor is None:
            return "the optimizer cannot step early any more"
        if not torch.equal(scale, self._factor):
            return CLIPPED
        if not _same_options(self._options, _options_of(optimizer)):
            return OPTIONS
        for one in self._stepped.values():
            has_all = all(s.grad is not None for s in one.bucket.shards if s.numel())
            if not has_all or one.bucket.storage.rest(GRAD).stamp() != one.stamp:
                return WRITTEN
        return ""


def _refusal(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    if isinstance(optimizer, SegmentStep):
        return f"{name} needs sums over whole tensors before it updates the first element"
    if not isinstance(optimizer, UndoableStep):
        return f"{name} cannot take a step back (it has no step_undoable): use an optimizer of ds_offload"
    return ""


def _options_of(optimizer: Any) -> list[dict[str, Any]]:
    """Returns a copy of the options of each parameter group."""
    return [
        {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def _same_options(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(_same(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
