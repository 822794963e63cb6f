"""Keeps the units of stage 3 gathered while a forward or a backward needs them.

[Note: who holds a unit]
forward   from the module's pre-hook to its post-hook. The post-hook also runs when forward raises, as
          activation checkpointing does to stop a recomputation early.
backward  from the first gradient of one of the module's outputs to the moment an earlier call takes over, or
          to the end of backward. Autograd runs nodes in the reverse order of their creation, so when the
          backward of a call begins, that of every call that began after its end is over.

A module inside a unit that is held gathers nothing. Modules inside of units are hooked as well, since they may
be called from outside their unit's forward.
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
    """Gathers units for the calls that a driver reports; does not know what drives it.

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
        """Buckets that are held to the end of backward, since no call was known to need them."""
        self._ever_unannounced: set[int] = set()
        """Buckets that were held so at some time, [Note: hidden outputs]."""
        self._keeps_all = False
        """Whether this backward builds a graph of its own, which needs the values again."""
        self._root_grew = False
        self._warned = False
        self._stay: set[str] = set()
        """Units that stay gathered between their forward and their backward, by `set_reshard_after_forward`."""

    @property
    def buckets(self) -> list[Bucket]:
        """Every bucket that is gathered for some unit."""
        return list({id(b): b for b in self._bucket_of.values()}.values())

    @property
    def units(self) -> list[str]:
        """Names of the units and of the modules with sharded parameters of their own."""
        return list(self._buckets_of)

    def bucket_of(self, param: Tensor) -> Bucket | None:
        """The bucket of a parameter; None for one that is never sharded."""
        return self._bucket_of.get(id(param))

    def is_held(self, bucket: Bucket) -> bool:
        """Whether the values are there for some call."""
        return self._gatherer.holds([bucket])

    def has_hidden_backward(self, call: Call) -> bool:
        """Whether a bucket of `call` was once needed by a backward of which no call was known."""
        return not self._ever_unannounced.isdisjoint(map(id, call.buckets))

    @property
    def none_open(self) -> bool:
        """Whether no forward runs."""
        return self._calls.none_open

    def set_stay(self, units: Sequence[str], stay: bool) -> None:
        """Whether `units` stay gathered between their forward and their backward."""
        (self._stay.update if stay else self._stay.difference_update)(units)

    # --- forward

    def enter(self, unit: str, *, training: bool) -> Call | None:
        """The forward of `unit` begins: gather it and start on the next ones; None if it is held already."""
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
        """The forward of `call` is over.

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
            self._end_pass(say=True)
            if not has_backward:
                self._gatherer.drop_unused()

    def hold_for_forward(self, bucket: Bucket, below: Call | None = None) -> None:
        """Gather until the outermost forward that runs is over, and again in its backward. Where no forward runs, or
        `below` is the outermost: until the end of the next backward, or the next step.
        """
        call = self._calls.outermost
        if call is None or call is below:
            self.hold_for_backward(bucket)
            return
        self._log.note("outside", bucket.layout.name)
        self._gatherer.acquire([bucket])
        call.buckets.append(bucket)

    def hold_in_root(self, bucket: Bucket) -> None:
        """From the next forward on, gather `bucket` with the parameters of the model itself."""
        if not any(b is bucket for b in self._buckets_of[ROOT]):
            self._buckets_of[ROOT].append(bucket)
            self._root_grew = True

    # --- backward

    def enter_backward(self, call: Call) -> None:
        """A gradient of one of the outputs of `call` has arrived."""
        self._keeps_all = self._keeps_all or torch.is_grad_enabled()
        self._order.begin(_BACKWARD)
        self._calls.take_over(call, keep_all=self._keeps_all)
        if call.buckets:
            self._log.note("backward", call.unit)
            self._acquire(call)

    def hold_for_backward(self, bucket: Bucket) -> bool:
        """Values are needed now by a backward of which no call is known; whether they had to be gathered."""
        if self._gatherer.holds([bucket]):
            return False
        self._log.note("unannounced", bucket.layout.name)
        self._ever_unannounced.add(id(bucket))
        self._unannounced.append(bucket)
        self._gatherer.acquire([bucket])
        return True

    def end_backward(self) -> None:
        """The outermost backward is over."""
        keep, self._keeps_all = self._keeps_all, False
        self._calls.leave_all(keep_all=keep)
        for bucket in self._unannounced:
            self._gatherer.release([bucket], keep=keep)
        self._unannounced.clear()
        self._end_pass(say=False)
        if not keep:
            self._gatherer.drop_unused()

    def abort(self) -> None:
        """A backward was left by an exception."""
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

    def _end_pass(self, *, say: bool) -> None:
        left = self._order.end()
        if self._root_grew:
            # The model itself holds more from now on, and the units that held it no longer gather it.
            self._root_grew = False
            self._order.clear()
        elif left is not None and say and not self._warned:
            self._warned = True
            ran, expected = (repr(name) if name else "nothing more" for name in left)
            warnings.warn(
                f"modules run in another order than in the previous pass: {ran} where {expected} was expected. What "
                "is gathered ahead is planned anew from each new order (said once)",
                stacklevel=2,
            )


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None
