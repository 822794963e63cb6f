"""Loss scaling for fp16: the scale, when it changes, and which steps are skipped.

[Note: dynamic loss scale]
fp16 represents no magnitudes below 6e-8 and none above 65504. The loss is multiplied by a scale S before backward, so
that small gradients do not become 0, and the gradients are divided by S before the optimizer uses them. S is kept as
large as possible without overflow. If the gradient on any rank is not finite, all ranks skip the step, and S is halved;
`hysteresis` is the number of such steps until it is. When more than `window` steps in a row were finite, S doubles, and
it doubles again after every further `window` steps.

Micikevicius et al., Mixed precision training (ICLR 2018), sections 3.2 and 4; the counting is that of
DeepSpeed's `DynamicLossScaler`, so that a configuration means the same.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
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
    """Number of the first step with non-finite gradients that halves the scale, counted from 1. From then on every such
    step halves it, until the scale doubles and the count restarts."""

    consecutive_hysteresis: bool = False
    """Whether the count of `hysteresis` restarts after every finite step."""

    min_scale: float = 1.0
    """Lower limit of the scale."""

    raise_at_min: bool = True
    """Whether a step with non-finite gradients at `min_scale` raises `LossScaleError`. If False, it is skipped as
    usual, with a warning the first time."""

    def __post_init__(self) -> None:
        if not self.min_scale > 0 or not self.initial_scale >= self.min_scale:
            raise ValueError(
                f"initial_scale={self.initial_scale}, min_scale={self.min_scale}: both must be positive, and min_scale "
                "must be at most initial_scale"
            )
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")


@dataclass
class ScaleState:
    """The scale and the counters that change it, [Note: dynamic loss scale]; pure Python, without tensors."""

    policy: DynamicScale | None
    """None: the scale never changes."""
    scale: float
    steps: int = 0
    """Number of steps so far, including skipped ones."""
    last_overflow: int = -1
    """Index of the last step whose gradient was not finite; -1 before the first."""
    left: int = field(default=1)
    """Number of overflows until the scale is halved: if 1, by the next one."""

    @classmethod
    def of(cls, scale: float | DynamicScale) -> ScaleState:
        if isinstance(scale, DynamicScale):
            return cls(policy=scale, scale=float(scale.initial_scale), left=scale.hysteresis)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: it must be a positive finite number, or a DynamicScale")
        return cls(policy=None, scale=float(scale))

    @property
    def at_minimum(self) -> bool:
        """Whether the next overflow cannot lower the scale, because it is at its minimum."""
        return self.policy is not None and self.left == 1 and self.scale == self.policy.min_scale

    def saved(self) -> dict[str, Any]:
        """Returns the scale and its counters, as plain numbers."""
        return {
            "dynamic": self.policy is not None,
            "scale": self.scale,
            "steps": self.steps,
            "last_overflow": self.last_overflow,
            "hysteresis_left": self.left,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restores the result of `saved`, except the policy: a static scale keeps its value, and a dynamic one starts
        at its initial value if a static one was saved.
        """
        if self.policy is None or not saved["dynamic"]:
            return
        self.steps = int(saved["steps"])
        self.last_overflow = int(saved["last_overflow"])
        self.left = min(int(saved["hysteresis_left"]), self.policy.hysteresis)
        self.scale = max(float(saved["scale"]), self.policy.min_scale)

    def update(self, overflow: bool) -> None:
        """Counts one step, and changes the scale if it is due."""
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
    If it is not finite, no parameter or optimizer state changes on any rank, the gradients are dropped, and
    `step_was_skipped` is True. The scaler can be used as long as the model is sharded.

    With the static scale 1, losses need not be passed to `scale`. The scaler then only skips steps whose gradient is
    not finite, which is useful in bf16, too.

    Args:
        model: a model that `ds_zero.shard` has returned.
        scale: a number for a static scale, or a `DynamicScale`. Default: `DynamicScale()`.

    Raises:
        ValueError: the model is not sharded, or has a scaler already.
    """

    def __init__(self, model: nn.Module, scale: float | DynamicScale | None = None) -> None:
        state = _registry.state_of(model)
        if state.scaler is not None:
            raise ValueError(
                "this model has a LossScaler already: use that one, as a model can have only one"
            )
        self._counting = ScaleState.of(DynamicScale() if scale is None else scale)
        self._state = weakref.ref(state)
        self._scaled = self._warned = False
        self.step_was_skipped = False
        """Whether the last `optimizer.step()` changed nothing because the gradient was not finite."""
        self.skipped_steps = 0
        """Number of steps that changed nothing because the gradient was not finite."""
        self.culprit: str | None = None
        """The parameter nearest to the loss whose gradient was not finite in the last skipped step, with the number of
        other such parameters."""
        state.scaler = self
        state.stepper.step_if(self._is_finite)

    @property
    def loss_scale(self) -> float:
        """The factor by which `scale` multiplies the next loss."""
        return self._counting.scale

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale, in fp32 or fp64, since fp16 would overflow. Call it before every backward.

        Raises:
            ValueError: the model is not sharded any more.
        """
        state = self._live()
        if not self._scaled:  # before this, the gradients of the last step may still be read with its scale
            self._scaled = True
            state.stepper.pending.loss_scale = self.loss_scale
        wide = loss if loss.dtype == torch.float64 else loss.float()
        return wide * self.loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and its counters, as plain numbers."""
        return {**self._counting.saved(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the `state_dict()` of any rank. The policy is not restored: a static scale keeps its value, and a
        dynamic one starts at its initial value if a static one was saved.

        Raises:
            ValueError: it is called between a backward and its step, whose gradients have the present scale.
        """
        if self._live().reducer.accumulating:
            raise ValueError(
                "load_state_dict between backward and step: the gradients were computed with the present loss scale; "
                "load after optimizer.step()"
            )
        self._scaled = False
        self.skipped_steps = int(state_dict["skipped_steps"])
        self._counting.restore(state_dict)

    # --- called by the step

    def _is_finite(self) -> bool:
        """Whether all gradients of this step are finite, so that it is taken. Updates the scale. Collective."""
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
            pending.measured(GradNorm(before=norm, after=norm))
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
            warnings.warn(f"{self._advice()}. Such steps are skipped (reported once)", stacklevel=4)

    def _live(self) -> ZeroState:
        state = self._state()
        if state is None or state.scaler is not self:
            raise ValueError("the model of this LossScaler is not sharded any more (ds_zero.destroy?)")
        return state

    def _advice(self) -> str:
        return (
            f"the loss scale is {self.loss_scale:g}, its minimum, and the gradient is still not finite, nearest "
            f"to the loss in {self.culprit}. Either training diverges (try a lower learning rate, and check "
            "the data of this step), or the gradients do not fit into fp16, whose largest number is "
            "65504: train in bf16, which has the range of fp32 and needs no loss scale "
            '(ZeroConfig(param_dtype=torch.bfloat16), or "bf16": {"enabled": true} in ds_config.json)'
        )


def first_not_finite(state: ZeroState) -> str:
    """Returns the name of the parameter nearest to the loss whose gradient is not finite, and the number of other such
    parameters. Nearest is the one that was registered last. Collective over all ranks that share the norm; their
    parameters may differ.
    """
    order: dict[str, int] = {}
    bad: set[str] = set()
    trainable = [b for b in state.buckets if b.trainable]
    for bucket in trainable:
        for slot in reversed(bucket.layout.slots):
            order[slot.fqn] = len(order)
    # A finite sum of squares needs no look at its elements, which may be away.
    noted = {id(b): state.norms.noted(b) for b in trainable}
    suspects = [b for b in trainable if (square := noted[id(b)]) is None or not math.isfinite(square)]
    with closing(visit(suspects, (GRAD,))) as visited:
        for bucket in visited:
            for slot, shard in reversed(list(zip(bucket.layout.slots, bucket.shards, strict=True))):
                if shard.grad is not None and not bool(torch.isfinite(shard.grad).all()):
                    bad.add(slot.fqn)
    for ranks in state.topology.norm_groups:
        if ranks.group is not None:
            of_ranks: list[Any] = [None] * ranks.size
            dist.all_gather_object(of_ranks, (order, bad), group=ranks.group)
            for their_order, their_bad in of_ranks:
                order = {**their_order, **order}
                bad = bad | their_bad
    if not bad:
        return "a parameter whose gradient has changed since"
    first = min(bad, key=lambda name: (order[name], name))
    others = f" (and {len(bad) - 1} more of {len(order)} parameters)" if len(bad) > 1 else ""
    return f"parameter {first!r}{others}"
