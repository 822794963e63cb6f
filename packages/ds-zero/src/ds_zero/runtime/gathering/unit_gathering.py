"""Keeps the units of stage 3 gathered while their forward or backward runs.

[Note: lifetime of a gathered unit]
forward   From the module's pre-hook to its post-hook. The post-hook also runs if forward raises, as
          activation checkpointing does to stop a recomputation early.
backward  From the first gradient of one of the module's outputs to the start of the backward of an earlier call, or
          to the end of backward. Autograd runs nodes in the reverse order of their creation. So when the backward of a
          call begins, the backwards of all calls that began after its end are over.

A module inside a gathered unit gathers nothing. Modules inside of units have hooks, too, since they may be called from
outside their unit's forward.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_zero.comm.order import OrderLog
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.forward_calls import Call, Calls
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.prefetch import Limits, Recorder
from ds_zero.runtime.gathering.unit_map import UnitMap
from ds_zero.runtime.gradients.backward import in_backward

ROOT = ""
_BACKWARD = ("in backward",)


class UnitGathering:
    """Gathers units for the forward calls that a driver, such as module hooks, reports.

    Every method is collective: all ranks report the same calls in the same order.
    """

    def __init__(self, gatherer: Gatherer, units: UnitMap, limits: Limits, log: OrderLog) -> None:
        self._gatherer, self._log = gatherer, log
        self._buckets_of = {unit: list(buckets) for unit, buckets in units.buckets.items()}
        self._buckets_of.setdefault(ROOT, [])
        self._bucket_of = {id(p): b for buckets in units.buckets.values() for b in buckets for p in b.params}
        numel_of = {u: sum(b.layout.padded_numel for b in bs) for u, bs in self._buckets_of.items()}
        self._order = Recorder(numel_of, limits)
        self._calls = Calls(gatherer)
        self._unannounced: list[Bucket] = []
        """Buckets that stay gathered to the end of backward, because their use was not reported as a call."""
        self._ever_unannounced: set[int] = set()
        """`id` of all buckets that have been in `_unannounced`, [Note: unreported backwards]."""
        self._keeps_all = False
        """Whether the running backward was called with create_graph=True, so that a later backward needs the values."""
        self._root_grew = False
        self._warned = False
        self._stay: set[str] = set()
        """Units that stay gathered between their forward and their backward, by `set_reshard_after_forward`."""

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets that belong to a unit."""
        return list({id(b): b for b in self._bucket_of.values()}.values())

    @property
    def units(self) -> list[str]:
        """Names of the units, and of the modules with sharded parameters of their own."""
        return list(self._buckets_of)

    def bucket_of(self, param: Tensor) -> Bucket | None:
        """Returns the bucket of a parameter; None if the parameter is never sharded."""
        return self._bucket_of.get(id(param))

    def is_held(self, bucket: Bucket) -> bool:
        """Whether the bucket is gathered for a call."""
        return self._gatherer.holds([bucket])

    def has_hidden_backward(self, call: Call) -> bool:
        """Whether a bucket of `call` has been used by a backward that was not reported."""
        return not self._ever_unannounced.isdisjoint(map(id, call.buckets))

    @property
    def none_open(self) -> bool:
        """Whether no forward is running."""
        return self._calls.none_open

    def set_stay(self, units: Sequence[str], stay: bool) -> None:
        """Sets whether `units` stay gathered between their forward and their backward."""
        (self._stay.update if stay else self._stay.difference_update)(units)

    # --- forward

    def enter(self, unit: str, *, training: bool) -> Call | None:
        """Called when the forward of `unit` begins. Gathers it and starts to prefetch the next units. Returns None if
        the unit is already gathered for another call.
        """
        buckets = self._buckets_of[unit]
        if buckets and self._gatherer.holds(buckets):
            return None
        backward = in_backward()
        if backward:
            self._order.begin(_BACKWARD)
        elif self._calls.none_open:
            self._log.thread_id = threading.get_ident()
            grads = torch.is_grad_enabled()
            self._order.begin((unit, training, grads), _BACKWARD if grads else None)
        if buckets and inside_transform():
            raise ValueError(
                f"module {unit!r} runs inside a torch.func transform (grad, vmap, ...) while its parameters are "
                "sharded: put the whole transformed call inside `with ds_zero.gathered(model.parameters()):`"
            )
        call = self._calls.begin(unit, buckets)
        if buckets:
            self._log.note("recompute" if backward else "forward", unit)
            self._acquire(call)
        return call

    def leave(self, call: Call, *, failed: bool, has_backward: bool) -> None:
        """Called when the forward of `call` has ended.

        Args:
            failed: whether it raised.
            has_backward: whether one of its outputs requires a gradient.
        """
        self._calls.end(call)
        stays = call.unit in self._stay and torch.is_grad_enabled()
        self._gatherer.release(call.buckets, keep=call.keep or stays)
        if not self._calls.none_open:
            return
        if failed:
            self._order.forget()
        if not in_backward():
            self._end_pass(warn=True)
            if not has_backward:
                self._gatherer.drop_unused()

    def hold_for_forward(self, bucket: Bucket, below: Call | None = None) -> None:
        """Gathers `bucket` until the end of the outermost running forward, and again in its backward. If no forward is
        running or `below` is the outermost one, until the end of the next backward or the next step.
        """
        call = self._calls.outermost
        if call is None or call is below:
            self.hold_for_backward(bucket)
            return
        self._log.note("outside", bucket.layout.name)
        self._gatherer.acquire([bucket])
        call.buckets.append(bucket)

    def hold_in_root(self, bucket: Bucket) -> None:
        """From the next forward on, gathers `bucket` during the whole forward and backward of the model."""
        if not any(b is bucket for b in self._buckets_of[ROOT]):
            self._buckets_of[ROOT].append(bucket)
            self._root_grew = True

    # --- backward

    def enter_backward(self, call: Call) -> None:
        """Called when the first gradient of an output of `call` has been computed."""
        self._keeps_all = self._keeps_all or torch.is_grad_enabled()
        self._order.begin(_BACKWARD)
        self._calls.begin_backward(call, keep_all=self._keeps_all)
        if call.buckets:
            self._log.note("backward", call.unit)
            self._acquire(call)

    def hold_for_backward(self, bucket: Bucket) -> bool:
        """Gathers `bucket` until the end of backward, for a use that was not reported as a call. Returns False if it
        was already gathered for a call.
        """
        if self._gatherer.holds([bucket]):
            return False
        self._log.note("unannounced", bucket.layout.name)
        self._ever_unannounced.add(id(bucket))
        self._unannounced.append(bucket)
        self._gatherer.acquire([bucket])
        return True

    def end_backward(self) -> None:
        """Called when the outermost backward has ended."""
        keep, self._keeps_all = self._keeps_all, False
        self._calls.end_backward(keep_all=keep)
        for bucket in self._unannounced:
            self._gatherer.release([bucket], keep=keep)
        self._unannounced.clear()
        self._end_pass(warn=False)
        if not keep:
            self._gatherer.drop_unused()

    def abort(self) -> None:
        """Called when it is detected that a backward raised."""
        self._calls.forget()
        self._unannounced.clear()
        self._keeps_all = False
        self._order.forget()
        self._gatherer.drop_all()

    # --- both

    def _acquire(self, call: Call) -> None:
        advice = self._order.enter(call.unit)
        call.keep = advice.keep
        self._gatherer.acquire(call.buckets, late=True)
        for unit in advice.fetch:
            for bucket in self._buckets_of[unit]:
                self._gatherer.start(bucket)

    def _end_pass(self, *, warn: bool) -> None:
        deviation = self._order.end()
        if self._root_grew:
            # From now on the model gathers more buckets itself, which their units then no longer do.
            self._root_grew = False
            self._order.clear()
        elif deviation is not None and warn and not self._warned:
            self._warned = True
            ran, expected = (repr(name) if name else "nothing more" for name in deviation)
            warnings.warn(
                f"modules ran in another order than in the previous pass: {ran} where {expected} was expected. The new "
                "order determines from now on which parameters are prefetched (reported once)",
                stacklevel=2,
            )


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None
