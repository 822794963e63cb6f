"""Local steps with an inner optimizer, and an outer step over what all ranks did: local SGD, DiLoCo."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from ds_comm.exchange.channel import Channel, Traffic
from ds_comm.optim.base import StepReport, clip_factor
from ds_comm.optim.flat import reduced
from ds_comm.optim.options import CompressionOptions
from ds_comm.optim.outer_step import OuterStep
from ds_core import kernels
from ds_core.optim import FusedSGD

LOCAL_KEY = "local_sgd"

Outer = Callable[[list[Tensor]], Optimizer]
"""Makes the outer optimizer over fp32 copies of the parameters."""


def nesterov(lr: float = 0.7, momentum: float = 0.9) -> Outer:
    """Returns the outer optimizer of DiLoCo: SGD with Nesterov momentum."""
    return lambda anchors: FusedSGD(anchors, lr=lr, momentum=momentum, nesterov=momentum > 0.0)


class LocalSGD(Optimizer):
    """Ranks step alone with an inner optimizer; every `sync_every` steps an outer optimizer takes the mean over ranks
    of what they changed as its gradient (DiLoCo: Douillard et al. 2023, arXiv 2311.08105, algorithm 1).

    The fp32 values that all ranks had after the last outer step are the anchors. The outer gradient is the anchors
    minus the mean of the parameters; after the outer step all ranks go on from the new anchors. An outer SGD with a
    rate of 1 and without momentum averages parameters: local SGD (Stich 2019).

    Use no DistributedDataParallel. All ranks must pass the same parameters in the same order and call `step` equally
    often. States of the inner optimizer, and between two outer steps the parameters, differ between ranks: evaluate
    and save where `synchronised`. Ranks that have no gradients call `step` all the same.

    `param_groups` and `state` are those of the inner optimizer, so that schedules of learning rates work.
    """

    reduces_gradients: ClassVar[bool] = True
    """ds-engine's declaration of an optimizer that must be given local gradients."""
    _step_supports_amp_scaling: ClassVar[bool] = True
    grad_scale: Tensor | float | None = 1.0
    """What gradients were multiplied by before the backward pass; None: nothing."""
    found_inf: Tensor | float | None = None
    """Not zero: this rank's gradients are not finite."""

    def __init__(
        self,
        inner: Optimizer,
        outer: Outer | None = None,
        sync_every: int = 64,
        *,
        start_step: int = 0,
        max_grad_norm: float = 0.0,
        group: dist.ProcessGroup | None = None,
        compression: CompressionOptions | None = None,
    ) -> None:
        """Args:
        inner: steps with the gradients of this rank.
        outer: makes the outer optimizer; None: `nesterov()`.
        sync_every: steps from one outer step to the next; the paper takes 500, after a start in step.
        start_step: number of first steps that average gradients over ranks instead, and whose result is the first
            anchor.
        max_grad_norm: clips this rank's gradient, or the mean one before `start_step`; 0 does not.
        group: the ranks; None: all.
        compression: how outer gradients are compressed, with error feedback; None: they are sent in fp32.
            `TopKCompressor` sends a few elements of each block.
        """
        if getattr(inner, "reduces_gradients", False):
            raise ValueError(
                f"LocalSGD: the inner optimizer {type(inner).__name__} averages gradients over ranks itself; use one "
                f"that steps alone, such as torch.optim.AdamW"
            )
        for name, value, least in (("sync_every", sync_every, 1), ("start_step", start_step, 0)):
            if value < least:
                raise ValueError(f"LocalSGD: {name} must be at least {least}, but is {value}")
        if not max_grad_norm >= 0.0:
            raise ValueError(f"LocalSGD: max_grad_norm must not be negative, but is {max_grad_norm}")
        self.inner = inner
        self.sync_every = sync_every
        self.start_step = start_step
        self.max_grad_norm = max_grad_norm
        self.report: StepReport | None = None
        self.channel = Channel(group)
        self._steps = 0
        self._alone = 0  # steps since the last outer step
        self._outer_step = OuterStep(self.channel, nesterov() if outer is None else outer, compression)
        super().__init__(inner.param_groups, inner.defaults)
        self._share()

    def _share(self) -> None:
        """Makes groups and states those of the inner optimizer, which replaces them when it loads a state."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that this rank has sent."""
        return self.channel.traffic

    @property
    def synchronised(self) -> bool:
        """Whether all ranks have the same parameters."""
        return self._alone == 0

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in an outer step, by formula; 0 before the first step."""
        return self._outer_step.wire_bytes

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`. Only where all ranks have the same parameters."""
        if "param_groups" in self.__dict__ and self.param_groups is self.inner.param_groups:
            if not self.synchronised:
                raise RuntimeError(
                    f"LocalSGD: ranks have different parameters {self._alone} steps after an outer step; call sync() "
                    f"before add_param_group()"
                )
            self.inner.add_param_group(param_group)
            return
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps the inner optimizer, and every `sync_every` calls the outer one. Collective then, in the steps before
        `start_step`, and in the first one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        if self._alone == 0:
            self._outer_step.begin(params)
        together = self._steps < self.start_step
        unscale = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        if together:
            unscale = self._average(params, unscale)
        self.report = self._prepare_gradients(params, unscale)
        if not self.report.skipped:
            self.inner.step()
        self._steps += 1
        if not together:
            self._alone += 1
            if self._alone == self.sync_every:
                self.sync()
        return loss

    def _average(self, params: Sequence[Tensor], unscale: float) -> float:
        """Averages gradients over ranks. Returns what they are still to be multiplied by."""
        # An overflow on one rank only, as `found_inf` reports it, must be one on all.
        bad = float("inf") if bool(self.found_inf) else 0.0
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        grads.append(torch.full((1,), bad, device=params[0].device if params else None))
        sums = reduced(grads, self.channel, unscale)
        self.found_inf = None if math.isfinite(float(sums.pop())) else 1.0
        for param, total in zip(params, sums, strict=True):
            param.grad = total.div_(self.channel.world_size).to(param.dtype)
        return 1.0

    def _prepare_gradients(self, params: Sequence[Tensor], unscale: float) -> StepReport:
        """Unscales and clips gradients, in place."""
        grads = [p.grad for p in params if p.grad is not None]
        squared, finite = kernels.squared_norm([g.to_dense() if g.is_sparse else g for g in grads])
        if not finite or bool(self.found_inf):
            return StepReport(skipped=True, grad_norm=math.inf, clip_factor=0.0)
        norm = math.sqrt(squared) * unscale
        clip = clip_factor(norm, self.max_grad_norm)
        if clip * unscale != 1.0:
            for grad in grads:
                grad.mul_(clip * unscale)
        return StepReport(skipped=False, grad_norm=norm, clip_factor=clip)

    @torch.no_grad()
    def sync(self) -> None:
        """The outer step, at once, if ranks have stepped since the last one. Collective: for the end of a training, or
        before a checkpoint.

        Raises FloatingPointError on every rank if the parameters of one are not finite.
        """
        if self._alone == 0:
            return
        self._outer_step(self._params(), self._alone)
        self._alone = 0

    # -- states

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of this rank, which loads on the same rank of as many; `merge_states` makes one for any
        number of ranks.
        """
        return {**self.inner.state_dict(), LOCAL_KEY: self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        counters = {"steps": self._steps, "alone": self._alone}
        place = {"form": "rank", "rank": self.channel.rank, "world_size": self.channel.world_size}
        return {**place, **counters, **self._outer_step.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads `state_dict()` of the same rank of as many ranks, or `merge_states(...)`."""
        own = state_dict.get(LOCAL_KEY)
        if own is None:
            raise ValueError(
                "LocalSGD: this state has no outer state: it is that of another optimizer; load it into "
                "optimizer.inner, and training begins with new anchors"
            )
        self._check_place(own)
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != LOCAL_KEY})
        self._share()
        self._load_own(own)

    def _check_place(self, own: Mapping[str, Any]) -> None:
        here = (self.channel.rank, self.channel.world_size)
        if own["form"] == "rank" and (own["rank"], own["world_size"]) != here:
            raise ValueError(
                f"LocalSGD: the state is that of rank {own['rank']} of {own['world_size']}, but this is rank "
                f"{here[0]} of {here[1]}; merge the states of all ranks first (merge_states)"
            )

    def _load_own(self, own: Mapping[str, Any]) -> None:
        self._steps, self._alone = int(own["steps"]), int(own["alone"])
        self._outer_step.load_state_dict(own, self._params())

    def residuals(self) -> dict[str, Any]:
        """Returns what a checkpoint needs besides states that are the same on all ranks: the states of this rank's
        inner optimizer, and those of the outer step.
        """
        inner = [dict(self.inner.state.get(p, {})) for p in self._params()]
        return {**self._own_state(), "inner": inner}

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Loads `residuals()` of all ranks that saved them. As many ranks as then continue exactly, and only need
        their own; others get the mean of the inner states. Empty: begins with new anchors.
        """
        here = (self.channel.rank, self.channel.world_size)
        own = [s for s in states if s["form"] == "rank" and (s["rank"], s["world_size"]) == here]
        if not states:
            self._steps, self._alone = 0, 0
            self._outer_step.forget()
            return
        state = own[0] if own else merge_local_states(states)
        for param, values in zip(self._params(), state["inner"], strict=True):
            held = self.inner.state[param]
            for name, value in values.items():
                place = held.get(name)
                if isinstance(place, Tensor) and isinstance(value, Tensor):
                    place.copy_(value.view_as(place))
                else:
                    held[name] = value.clone() if isinstance(value, Tensor) else value
        self._load_own(state)

    # -- plans

    def planned_states(self, num_ranks: int) -> Mapping[str, tuple[torch.dtype, float]]:
        """Returns the states in a job of so many ranks: name -> dtype, and number of elements for each element of a
        parameter.
        """
        inner = {name: (dtype, 1.0) for name, dtype in self._inner_states().items()}
        return {**inner, **self._outer_step.planned_states(num_ranks)}

    def planned_bytes(self, numels: Sequence[int], num_ranks: int) -> int:
        """Returns the bytes that rank 0 of so many ranks sends for each local step, on average."""
        if num_ranks == 1:
            return 0
        return -(-self._outer_step.planned_bytes(numels, num_ranks) // self.sync_every)

    def _inner_states(self) -> dict[str, torch.dtype]:
        """Which states the inner optimizer creates: seen in a step of a copy over one small tensor. Plans ask in a mode
        in which tensors have no values.
        """
        with _disable_current_modes():
            return self._probe()

    def _probe(self) -> dict[str, torch.dtype]:
        planned = getattr(self.inner, "planned_states", None)
        if planned is not None:
            return {name: dtype for name, (dtype, _) in planned(1).items()}
        kind = type(self.inner)
        probe = torch.nn.Parameter(torch.ones(64))
        probe.grad = torch.ones(64)
        trial = object.__new__(kind)
        trial.__dict__ = {
            name: type(value)() if name.endswith("_hooks") else value
            for name, value in vars(self.inner).items()
        }
        trial.state = type(self.inner.state)(dict)
        trial.param_groups = [{**self.inner.param_groups[0], "params": [probe]}]
        trial.step()
        states = trial.state[probe].items()
        return {k: v.dtype for k, v in states if isinstance(v, Tensor) and v.numel() == probe.numel()}


def merge_local_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges what `LocalSGD` adds to the states of all ranks, and, where it is there, the list `inner`.

    Raises ValueError if they are not those of all ranks of one group, taken where all had the same parameters.
    """
    by_rank = {state["rank"]: state for state in states}
    if sorted(by_rank) != list(range(states[0]["world_size"])) or len(by_rank) != len(states):
        raise ValueError(
            f"merging needs the states of all {states[0]['world_size']} ranks, each once; given were those of ranks "
            f"{[state['rank'] for state in states]}"
        )
    if any(state["alone"] for state in states):
        raise ValueError(
            f"LocalSGD: the states were saved {states[0]['alone']} steps after an outer step, when ranks had "
            f"different parameters; save where optimizer.synchronised is True, or call optimizer.sync() before"
        )
    ordered = [by_rank[rank] for rank in range(len(by_rank))]
    merged = {**ordered[0], "form": "whole", "feedback": OuterStep.merged_feedback(ordered)}
    if "inner" in merged:
        merged["inner"] = [mean_of(parts) for parts in zip(*(s["inner"] for s in ordered), strict=True)]
    return merged


def mean_of(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean over ranks of a parameter's states: of tensors of floating point; others are the first one's."""
    mean = dict(states[0])
    for name, value in mean.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            mean[name] = torch.stack([state[name].to("cpu", torch.float32) for state in states]).mean(0)
    return mean


__all__ = ["LOCAL_KEY", "LocalSGD", "Outer", "mean_of", "merge_local_states", "nesterov"]
