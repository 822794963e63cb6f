"""Explicit control of a sharded model: when parameters are gathered, and when gradients are reduced.

[Note: drivers]
In an ordinary loop, module hooks gather and drop units. A pipeline executor does this by actions of its schedule, and
an optimizer that reduces gradients by itself turns reduction off. All use the same objects (`Gatherer`,
`UnitGathering`, `Reducer`). Code outside of ds_zero uses them through `Control`, whose methods have the names of
torch's `FSDPModule`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from ds_zero import _registry
from ds_zero.interfaces import Reduction, Work
from ds_zero.runtime.bucket import Bucket
from ds_zero.state import ZeroState


class Control:
    """Controls a sharded model, or the part of it below one module. `control` makes it.

    It has no state of its own, so it can be made again at any time.
    """

    def __init__(self, state: ZeroState, module: nn.Module, name: str, is_model: bool) -> None:
        self._state, self._name, self._is_model = weakref.ref(state), name, is_model
        ids = {id(p) for p in module.parameters()}
        self._buckets: list[Bucket] = [
            b for b in state.buckets if not b.whole and any(id(p) in ids for p in b.params)
        ]

    # --- parameters

    def unshard(self, async_op: bool = False) -> Work | None:
        """Gathers the parameters until `reshard` or the next `optimizer.step()` (stage 3; at lower stages they are
        always whole). They must not be written.

        Module hooks do not drop parameters that were gathered by this method. Calling it again has no effect.
        Collective.

        Args:
            async_op: return at once; the parameters may be read after `wait()` of the returned object.
        """
        state = self._live()
        state.waiting.log.note("unshard", self._name)
        state.gatherer.pin(self._buckets)
        work = _Unsharding(state, self._buckets)
        if async_op:
            return work
        work.wait()
        return None

    def reshard(self) -> None:
        """Drops the gathered parameters as soon as no running forward or backward needs them. Collective."""
        state = self._live()
        state.waiting.log.note("reshard", self._name)
        state.gatherer.unpin(self._buckets)

    def set_reshard_after_forward(self, reshard_after_forward: bool, *, recurse: bool = True) -> None:
        """Sets whether units are dropped between forward and backward. True (the default) takes less memory and
        gathers them twice. All ranks must pass the same value.

        Args:
            recurse: apply it to all units inside of the module, too.
        """
        gathering = self._live().gathering
        inside = f"{self._name}." if self._name else ""
        units = [
            u
            for u in gathering.units
            if u == self._name or (recurse and (u.startswith(inside) or not inside))
        ]
        gathering.set_stay(units, not reshard_after_forward)

    # --- gradients

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Sets whether backwards from now on reduce gradients. With False they add whole gradients on each rank, as
        in `ds_zero.no_sync`; the first backward with True, or the next step, reduces them. All ranks must pass the
        same value.

        Raises:
            ValueError: this controls a part of the model, but gradients of the whole model are reduced together.
        """
        self._check_whole("set_requires_gradient_sync", recurse)
        self._live().reducer.requires_sync = requires_gradient_sync

    @property
    def backwards(self) -> int:
        """Number of backwards of the model since the last step."""
        return self._live().reducer.backwards

    @property
    def reduction(self) -> Reduction:
        """When gradients are reduced."""
        return self._live().reducer.reduction

    def set_reduction(self, reduction: Reduction) -> None:
        """Sets when gradients are reduced. All ranks must call it with the same value, between a step and the next
        backward.

        Args:
            reduction: "local": each rank adds whole gradients of its micro-batches, and the last backward before a step
                reduces them. "sharded": every backward reduces, and each rank adds its shard. "none": only the
                optimizer reduces: `optimizer.param_groups[g]["params"][i]` is a whole 1-D fp32 master, and its
                `.grad` is the gradient of this rank alone. After a step, the optimizer must have the same values on
                all ranks.

        Raises:
            ValueError: an unknown value; this controls a part of the model; gradients wait for a step; or "none" at
                stages 1 to 3, where masters are sharded.
        """
        self._check_whole("set_reduction", True)
        self._live().reducer.set_reduction(reduction)

    # --- failures

    def fail(self, reason: str) -> None:
        """Makes the other ranks raise `reason` where they wait for this one, which cannot go on. The process groups
        cannot be used afterwards. Without `ZeroConfig.order_timeout_s` it has no effect.
        """
        self._live().waiting.fail(reason)

    def _check_whole(self, what: str, recurse: bool) -> None:
        if not self._is_model:
            raise ValueError(
                f"{what} on module {self._name!r}: gradients of the whole model are reduced together; call it on "
                "ds_zero.control(model)"
            )
        if not recurse:
            raise ValueError(f"{what}(recurse=False): gradients of the whole model are reduced together")

    def _live(self) -> ZeroState:
        state = self._state()
        if state is None:
            raise ValueError("the model of this control is no longer sharded (was ds_zero.destroy called?)")
        return state


class _Unsharding:
    """The gathers that one `unshard` call has started."""

    def __init__(self, state: ZeroState, buckets: Sequence[Bucket]) -> None:
        self._state, self._buckets = weakref.ref(state), list(buckets)

    def wait(self) -> None:
        """Returns when the parameters may be read."""
        state = self._state()
        if state is None:
            return
        for bucket in self._buckets:
            if state.gatherer.is_pinned(bucket):  # otherwise it was resharded in the meantime
                state.gatherer.finish(bucket, late=True)


def control(model: nn.Module, module: nn.Module | None = None) -> Control:
    """Returns the control of a sharded model, or of the part of it below `module`, [Note: drivers].

    ::

        block = ds_zero.control(model, model.blocks[3])
        handle = block.unshard(async_op=True)      # gathers ahead
        ...
        handle.wait()
        y = model.blocks[3](x)
        block.reshard()

    Args:
        model: a model that `ds_zero.shard` has returned.
        module: one of its modules; None: the model itself.

    Raises:
        ValueError: the model is not sharded, or does not contain the module.
    """
    state = _registry.state_of(model)
    if module is None or module is model:
        return Control(state, model, "", True)
    for name, candidate in model.named_modules():
        if candidate is module:
            return Control(state, module, name, False)
    raise ValueError(
        f"this {type(module).__name__} is not a module of the {type(model).__name__}: pass one of model.modules()"
    )
