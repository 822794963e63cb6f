"""Loss scaling for fp16: the scale, when it changes, and which steps are left out.

[Note: dynamic loss scale]
fp16 has no numbers below 6e-8 and none above 65504. The loss is multiplied by a scale S before backward, so
that small gradients do not vanish, and the gradients are divided by it before the optimizer sees them. S is
as large as it may be: a step whose gradient is not finite on any rank is left out on all of them, and S is
halved, unless `hysteresis` lets some go by first; once more than `window` steps in a row were finite, S doubles, and
again after every further `window`.

Micikevicius et al., Mixed precision training (ICLR 2018), sections 3.2 and 4; the counting is that of
DeepSpeed's `DynamicLossScaler`, so that a configuration means the same.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.runtime.gradients.grad_scale import GradNorm
from ds_zero.runtime.storage import GRAD, visit
from ds_zero.state import ZeroState

FACTOR = 2.0


class LossScaleError(ValueError):
    """A gradient is not finite although the loss scale is at its minimum."""


@dataclass(frozen=True, kw_only=True)
class DynamicScale:
    """How a dynamic loss scale starts and changes."""

    initial_scale: float = 2.0**16
    """The scale of the first step."""

    window: int = 1000
    """Finite steps in a row after which the scale doubles; one step more before the first doubling."""

    hysteresis: int = 2
    """Which step with non-finite gradients, counted from 1, is the first to halve the scale. From then on every such
    step halves it, until the scale doubles and the count restarts."""

    consecutive_hysteresis: bool = False
    """Restart the count of `hysteresis` after every finite step."""

    min_scale: float = 1.0
    """The scale is never lower."""

    raise_at_min: bool = True
    """A step with non-finite gradients at `min_scale` raises `LossScaleError`. False: it is skipped like others, and
    the first one warns."""

    def __post_init__(self) -> None:
        if not self.min_scale > 0 or not self.initial_scale >= self.min_scale:
            raise ValueError(
                f"initial_scale={self.initial_scale}, min_scale={self.min_scale}: give positive numbers, the "
                "second at most as large as the first"
            )
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")


@dataclass
class ScaleState:
    """The counting of [Note: dynamic loss scale]: a state machine without tensors. A static scale never
    changes.
    """

    policy: DynamicScale | None
    """None: static."""
    scale: float
    steps: int = 0
    last_overflow: int = -1
    """Index of the last step that was not finite; -1 before the first."""
    left: int = field(default=1)
    """The count of `hysteresis`: at 1 the next overflow halves the scale."""

    @classmethod
    def of(cls, scale: float | DynamicScale) -> ScaleState:
        if isinstance(scale, DynamicScale):
            return cls(policy=scale, scale=float(scale.initial_scale), left=scale.hysteresis)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: give a positive number, or a DynamicScale")
        return cls(policy=None, scale=float(scale))

    @property
    def at_minimum(self) -> bool:
        """Whether an overflow now has no answer."""
        return self.policy is not None and self.left == 1 and self.scale == self.policy.min_scale

    def update(self, overflow: bool) -> None:
        """Count one step."""
        policy = self.policy
        if policy is not None and overflow:
            if self.left == 1:
                self.scale = max(self.scale / FACTOR, policy.min_scale)
            else:
                self.left -= 1
            self.last_overflow = self.steps
        elif policy is not None:
            if policy.consecutive_hysteresis:
                self.left = policy.hysteresis
            stable = self.steps - self.last_overflow - 1
            if stable > 0 and stable % policy.window == 0:
                self.left = policy.hysteresis
                self.scale *= FACTOR
        self.steps += 1


class LossScaler:
    """Loss scaling for a sharded model: skips a step on all ranks if the gradient of any rank is not finite.

    ::

        scaler = ds_zero.LossScaler(model)                # after ds_zero.shard
        scaler.scale(loss).backward()
        ds_zero.clip_grad_norm_(model, 1.0)               # optional; norm and limit refer to unscaled gradients
        optimizer.step()                                  # unscales, or skips the step; updates the scale
        optimizer.zero_grad()

    No other call is needed. `optimizer.step()` computes the norm of the gradient unless `clip_grad_norm_` has done so.
    If it is not finite, no rank changes anything, the gradients are dropped, and `step_was_skipped` is True. The scaler
    exists as long as the model is sharded.

    With the static scale 1, losses need not go through `scale`. The scaler then only skips steps whose gradient is not
    finite, which is useful in bf16, too.

    Args:
        model: a model that `ds_zero.shard` has returned.
        scale: a number for a constant scale, or a `DynamicScale`; None: `DynamicScale()`.

    Raises:
        ValueError: the model is not sharded, or has a scaler already.
    """

    def __init__(self, model: nn.Module, scale: float | DynamicScale | None = None) -> None:
        state = _registry.state_of(model)
        if state.scaler is not None:
            raise ValueError("this model has a LossScaler already: use that one")
        self._counting = ScaleState.of(DynamicScale() if scale is None else scale)
        self._state = weakref.ref(state)
        self._scaled = self._warned = False
        self.step_was_skipped = False
        """Whether the last `optimizer.step()` changed nothing because the gradient was not finite."""
        self.skipped_steps = 0
        """How many steps changed nothing."""
        self.culprit: str | None = None
        """Where the last gradient that was not finite came from: the parameter nearest to the loss."""
        state.scaler = self
        state.stepper.ask(self._judge)

    @property
    def loss_scale(self) -> float:
        """The factor by which `scale` multiplies the next loss."""
        return self._counting.scale

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in fp32 or wider since an fp16 loss would overflow. Call it before every backward.

        Raises:
            ValueError: the model is not sharded any more.
        """
        state = self._live()
        if not self._scaled:  # until here the gradients of the last step may still be looked at
            self._scaled = True
            state.stepper.pending.loss_scale = self.loss_scale
        wide = loss if loss.dtype == torch.float64 else loss.float()
        return wide * self.loss_scale

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters: plain numbers."""
        counting = self._counting
        return {
            "dynamic": counting.policy is not None,
            "scale": counting.scale,
            "steps": counting.steps,
            "last_overflow": counting.last_overflow,
            "hysteresis_left": counting.left,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of any rank. The policy is this scaler's own: a static scale stays, and
        a dynamic one begins anew where a static one was saved.

        Raises:
            ValueError: between a backward and its step, whose gradients carry the present scale.
        """
        if self._live().reducer.accumulating:
            raise ValueError(
                "load_state_dict between backward and step: the gradients carry the present loss scale; load "
                "after optimizer.step()"
            )
        self._scaled = False
        counting = self._counting
        self.skipped_steps = int(state_dict["skipped_steps"])
        if counting.policy is None or not state_dict["dynamic"]:
            return
        counting.steps = int(state_dict["steps"])
        counting.last_overflow = int(state_dict["last_overflow"])
        counting.left = min(int(state_dict["hysteresis_left"]), counting.policy.hysteresis)
        counting.scale = max(float(state_dict["scale"]), counting.policy.min_scale)

    # --- what the step asks

    def _judge(self) -> bool:
        """Whether the step that begins is taken. Collective."""
        state = self._live()
        pending = state.stepper.pending
        if self.loss_scale != 1.0 and not self._scaled and state.reducer.accumulating:
            raise ValueError(
                f"the loss of this step was not scaled, so dividing its gradients by the loss scale "
                f"{self.loss_scale:g} would make them vanish: call scaler.scale(loss).backward() (with an engine: "
                "engine.backward(loss), or engine.scale(loss).backward()) instead of loss.backward()"
            )
        if pending.norm is None:
            norm = float(state.measure())
            pending.found(GradNorm(before=norm, after=norm))
        assert pending.norm is not None
        overflow = not pending.norm.finite
        self._scaled, self.step_was_skipped = False, overflow
        if overflow:
            self.culprit = first_not_finite(state)
            if self._counting.at_minimum:
                self._at_minimum(state)
            self.skipped_steps += 1
        self._counting.update(overflow)
        return not overflow

    def _at_minimum(self, state: ZeroState) -> None:
        policy = self._counting.policy
        if policy is None or policy.raise_at_min:
            state.stepper.forget()
            raise LossScaleError(self._advice())
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._advice()}. Such steps are left out (said once)", stacklevel=4)

    def _live(self) -> ZeroState:
        state = self._state()
        if state is None or state.scaler is not self:
            raise ValueError("the model of this LossScaler is not sharded any more (ds_zero.destroy?)")
        return state

    def _advice(self) -> str:
        return (
            f"the loss scale is {self.loss_scale:g}, its minimum, and the gradient is still not finite; nearest "
            f"to the loss is that of {self.culprit}. Either training diverges (try a lower learning rate, and "
            "look at the data of this step), or the gradients do not fit into fp16, whose largest number is "
            "65504: train in bf16, which has the range of fp32 and needs no loss scale "
            '(ZeroConfig(param_dtype=torch.bfloat16), or "bf16": {"enabled": true} in ds_config.json)'
        )


def first_not_finite(state: ZeroState) -> str:
    """Name of the parameter whose gradient is not finite and which backward reached first, as far as the order
    of registration tells; with the number of others. Collective, over all ranks that share the norm, whose
    parameters may differ.
    """
    order: dict[str, int] = {}
    bad: set[str] = set()
    with closing(visit([b for b in state.buckets if b.trainable], (GRAD,))) as visited:
        for bucket in visited:
            for slot, shard in reversed(list(zip(bucket.layout.slots, bucket.shards, strict=True))):
                order[slot.fqn] = len(order)
                if shard.grad is not None and not bool(torch.isfinite(shard.grad).all()):
                    bad.add(slot.fqn)
    for ranks in state.norm_groups:
        if ranks.group is not None:
            told: list[Any] = [None] * ranks.size
            dist.all_gather_object(told, (order, bad), group=ranks.group)
            for their_order, their_bad in told:
                order = {**their_order, **order}
                bad = bad | their_bad
    if not bad:
        return "a gradient that has changed since"
    first = min(bad, key=lambda name: (order[name], name))
    others = f" (and {len(bad) - 1} more of {len(order)} parameters)" if len(bad) > 1 else ""
    return f"parameter {first!r}{others}"
