"""What the optimizers that reduce gradients themselves have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.feedback import merge_feedback_states
from ds_comm.exchange import wire
from ds_comm.exchange.channel import Channel, Traffic
from ds_comm.optim.compressed_state import CompressedState
from ds_comm.optim.flat import reduced
from ds_comm.optim.options import CompressionOptions
from ds_core import kernels

FEEDBACK_KEY = "error_feedback"


@dataclass
class Entry:
    """One parameter in one step."""

    param: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    grad: Tensor | None
    """This rank's own gradient, dense; None: it has none."""
    step: int
    """Updates of this parameter so far."""

    @property
    def values(self) -> Tensor:
        """The fp32 values that are updated: the parameter, or its master copy."""
        master = self.state.get("master")
        return self.param.detach() if master is None else master

    def publish(self) -> None:
        """Copies the master copy to the parameter."""
        if "master" in self.state:
            self.param.detach().copy_(self.state["master"])


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What all ranks agreed on in a step."""

    skipped: bool
    """Whether the step was left out, because a gradient of some rank was not finite. Nothing was changed then, nor
    were residuals."""
    grad_norm: float
    """Norm before clipping. While gradients are reduced: of the mean gradient. In the compressed phase: the root of the
    mean over ranks of the squared norms, which is at least the norm of the mean gradient."""
    clip_factor: float
    """What gradients were multiplied by."""


def check_limits(freeze_step: int, max_grad_norm: float) -> None:
    """Raises ValueError if one of them is out of range."""
    if freeze_step < 1:
        raise ValueError(f"freeze_step must be at least 1, but is {freeze_step}")
    if not max_grad_norm >= 0.0:
        raise ValueError(f"max_grad_norm must not be negative, but is {max_grad_norm}; 0 turns clipping off")


def clip_factor(norm: float, max_grad_norm: float) -> float:
    """What gradients with this norm are multiplied by; a `max_grad_norm` of 0 does not clip."""
    if max_grad_norm == 0.0 or norm <= max_grad_norm:
        return 1.0
    return max_grad_norm / (norm + 1e-6)


class ReducingOptimizer(Optimizer):
    """What all optimizers over local gradients have: a group of ranks, a loss scale, and the same first parameters.

    `torch.amp.GradScaler.step(optimizer)` works: gradients are unscaled here, and a gradient that is not finite on any
    rank makes all ranks skip the step.
    """

    reduces_gradients: ClassVar[bool] = True
    """ds-engine's declaration of an optimizer that must be given local gradients."""
    _step_supports_amp_scaling: ClassVar[bool] = True
    grad_scale: Tensor | float | None = 1.0
    """What gradients were multiplied by before the backward pass; None: nothing. Ranks may have different scales."""
    found_inf: Tensor | float | None = None
    """Not zero: this rank's gradients are not finite."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        freeze_step: int,
        max_grad_norm: float = 0.0,
        group: dist.ProcessGroup | None = None,
        compression: CompressionOptions | None = None,
    ) -> None:
        check_limits(freeze_step, max_grad_norm)
        self.channel = Channel(group)
        self.compression = CompressionOptions() if compression is None else compression
        self.freeze_step = freeze_step
        self.max_grad_norm = max_grad_norm
        self.report: StepReport | None = None
        super().__init__(params, defaults)

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that this rank has sent."""
        return self.channel.traffic

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`. Collective: parameters are broadcast."""
        super().add_param_group(param_group)
        if self.compression.broadcast_parameters:
            for param in self.param_groups[-1]["params"]:
                self.channel.broadcast(param.detach())

    def _unscale(self) -> float:
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    def _part_bytes_of(self, numels: Sequence[int], num_ranks: int) -> list[int]:
        """Returns the payload of each rank's part of parameters with `numels` elements."""
        compressor = self.compression.compressor
        blocks, _ = Blocks.of(numels, compressor.block_numel)
        return [compressor.payload_bytes(part) for _, part in blocks.cut(num_ranks)]

    def planned_bytes(self, numels: Sequence[int], num_ranks: int) -> int:
        """Returns the bytes that rank 0 of so many ranks sends in a step of the compressed phase for parameters of
        `numels` elements.
        """
        return 0 if num_ranks == 1 else wire.two_phase_bytes(self._part_bytes_of(numels, num_ranks), 0)


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """Returns the loss of a closure of `Optimizer.step`, which computes gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class SelfReducingOptimizer(ReducingOptimizer):
    """Base of optimizers over local gradients: `param.grad` is this rank's own gradient, and `step` is collective.

    Use no DistributedDataParallel around the model. All ranks of the group must pass the same parameters in the same
    order and call `step` equally often; a rank without a batch calls it without gradients, which count as zeros.

    A parameter's first `freeze_step` updates reduce its gradient at full precision; then it changes to compressed
    communication. Parameters without gradient on all ranks are skipped in the first phase; in the second one a missing
    gradient counts as zeros. Parameters of 16 bits get an fp32 master copy.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        freeze_step: int,
        max_grad_norm: float = 0.0,
        group: dist.ProcessGroup | None = None,
        compression: CompressionOptions | None = None,
    ) -> None:
        super().__init__(
            params,
            defaults,
            freeze_step=freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )
        self._model_group: dist.ProcessGroup | None = None
        self._compressed = CompressedState(self.channel, self.compression)

    @property
    def compressed_state(self) -> CompressedState:
        """The buffers of the compressed phase: residuals, and what is sent."""
        return self._compressed

    def share_norms(self, model_group: dist.ProcessGroup | None) -> None:
        """Sets the ranks that hold the other parts of the model, as pipeline stages: norms are over all parts, and all
        of them skip a step together. None, as without this call: this rank has the whole model.
        """
        self._model_group = model_group

    # -- implemented by a subclass

    def _is_dense(self, entry: Entry) -> bool:
        """Whether this update of a parameter reduces its gradient at full precision; the same on all ranks."""
        return entry.step < self.freeze_step

    def _is_local(self, entries: Sequence[Entry]) -> bool:
        """Whether this step sends nothing; the same on all ranks."""
        return False

    @abstractmethod
    def _dense_step(self, entries: Sequence[Entry], sums: Sequence[Tensor], factor: float) -> None:
        """Updates parameters from `sums * factor`, their mean gradients, clipped."""

    @abstractmethod
    def _compressed_step(self, entries: Sequence[Entry], factor: float) -> None:
        """Updates parameters of the compressed phase; local gradients are to be multiplied by `factor`."""

    # -- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduces, and updates all parameters. Collective. `closure` re-evaluates the model and returns the loss."""
        loss = evaluated(closure)
        entries = [entry for group in self.param_groups for entry in self._entries(group)]
        dense = [entry for entry in entries if self._is_dense(entry)]
        compressed = [entry for entry in entries if not self._is_dense(entry)]
        unscale = self._unscale()
        if not dense and compressed and self._is_local(compressed):
            return self._local_step(compressed, unscale, loss)
        skipped, squared, present = self._agree(dense, compressed, unscale)
        if skipped:
            self.report = StepReport(skipped=True, grad_norm=math.inf, clip_factor=0.0)
            return loss
        dense = [entry for entry, has in zip(dense, present, strict=True) if has]
        own = [_grad_or_zeros(entry) for entry in dense]
        sums = reduced(own, self.channel, unscale, self.compression.reduce_dtype)
        mean = 1.0 / self.channel.world_size
        [total] = self._over_model(squared + kernels.squared_norm(sums)[0] * mean * mean)
        norm = math.sqrt(total)
        clip = clip_factor(norm, self.max_grad_norm)
        if dense:
            self._dense_step(dense, sums, clip * mean)
        if compressed:
            self._compressed_step(compressed, clip * unscale)
        for entry in (*dense, *compressed):
            entry.state["step"] += 1
            entry.publish()
        self.report = StepReport(skipped=False, grad_norm=norm, clip_factor=clip)
        return loss

    def _local_step(self, entries: Sequence[Entry], unscale: float, loss: float | None) -> float | None:
        """A step without messages to replicas. If the gradients of one replica are not finite, it alone goes on without
        them.
        """
        total, finite = kernels.squared_norm([entry.grad for entry in entries if entry.grad is not None])
        bad, total = self._over_model(float(not finite or bool(self.found_inf)), total if finite else 0.0)
        skipped = bad > 0.0
        if skipped:
            for entry in entries:
                entry.grad = None
        norm = math.inf if skipped else math.sqrt(total) * unscale
        clip = clip_factor(norm, self.max_grad_norm) if not skipped else 0.0
        self._compressed_step(entries, clip * unscale)
        for entry in entries:
            entry.state["step"] += 1
            entry.publish()
        self.report = StepReport(skipped=skipped, grad_norm=norm, clip_factor=clip)
        return loss

    def _entries(self, group: dict[str, Any]) -> Iterable[Entry]:
        for param in group["params"]:
            if not param.requires_grad:
                continue
            state = self.state[param]
            if not state:
                self._new_state(param, state)
            grad = param.grad
            if grad is not None:
                grad = (grad.to_dense() if grad.is_sparse else grad).contiguous()
            yield Entry(param, group, state, grad, int(state["step"]))

    def _new_state(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        if param.dtype != torch.float32:
            state["master"] = param.detach().to(
                torch.float32, memory_format=torch.contiguous_format, copy=True
            )

    def _agree(
        self, dense: Sequence[Entry], compressed: Sequence[Entry], unscale: float
    ) -> tuple[bool, float, list[bool]]:
        """One small all-reduce of what all ranks must know.

        Returns:
            Whether to skip the step; the mean over ranks of the squared norm of compressed gradients; whether each
            dense parameter has a gradient on some rank.
        """
        own, finite_dense = kernels.squared_norm([e.grad for e in dense if e.grad is not None])
        own, finite = kernels.squared_norm([e.grad for e in compressed if e.grad is not None])
        bad = not (finite and finite_dense) or bool(self.found_inf)
        squared = own * unscale * unscale if finite else 0.0
        flags = [float(entry.grad is not None) for entry in dense]
        device = dense[0].param.device if dense else compressed[0].param.device if compressed else None
        numbers = torch.tensor([float(bad), squared, *flags], dtype=torch.float64, device=device)
        self.channel.all_reduce(numbers).wait()
        skip, total, *counts = numbers.tolist()
        [skip] = self._over_model(skip)
        return skip > 0.0, total / self.channel.world_size, [count > 0.0 for count in counts]

    def _over_model(self, *values: float) -> list[float]:
        """Returns the sums over the parts of the model."""
        if self._model_group is None:
            return list(values)
        # Gathered and added in one order, so that the norm has the same bits on all parts.
        every: list[Any] = [None] * dist.get_world_size(self._model_group)
        dist.all_gather_object(every, values, self._model_group)
        return [math.fsum(column) for column in zip(*every, strict=True)]

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with this rank's residuals under "error_feedback". Every rank saves
        its own; `merge_states` makes one state for any number of ranks of them.
        """
        state = super().state_dict()
        state[FEEDBACK_KEY] = self._compressed.state_dict()
        return state

    def whole_state_dict(self) -> dict[str, Any]:
        """Collective. Returns a state that loads on any number of ranks, the same on all of them.

        It sends 8 bytes for each parameter element in the compressed phase.
        """
        state = super().state_dict()
        state[FEEDBACK_KEY] = self._compressed.whole_state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads `state_dict()` of the same rank of as many ranks, `whole_state_dict()`, or `merge_states(...)`.

        A state of `torch.optim.AdamW` loads too: it has the same names.
        """
        super().load_state_dict(dict(state_dict))
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=True):
            values = state_dict["state"].get(key)
            if values is None:
                continue
            # torch has cast what it loaded to the parameter's dtype.
            state = self.state[param]
            for name, value in values.items():
                if name == "step":
                    state[name] = torch.as_tensor(value, dtype=torch.float32, device="cpu").clone()
                elif isinstance(value, Tensor) and value.is_floating_point():
                    state[name] = value.detach().to(param.device, torch.float32, copy=True).contiguous()
            if param.dtype != torch.float32 and "master" not in state:
                state["master"] = param.detach().to(torch.float32, copy=True)
        self._compressed.load_state_dict(state_dict.get(FEEDBACK_KEY))

    def residuals(self) -> dict[str, Any] | None:
        """Returns this rank's residuals; None before the compressed phase. For a checkpoint that has the states of
        parameters already.
        """
        return self._compressed.state_dict()

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Loads `residuals()` of all ranks that have saved them, after the states of the parameters. As many ranks as
        then continue exactly, and only need their own; others share the residuals. Empty: begins without residuals.
        """
        world = (self.channel.rank, self.channel.world_size)
        own = [s for s in states if s["form"] == "rank" and (s["rank"], s["world_size"]) == world]
        self._compressed.load_state_dict(own[0] if own else merge_feedback_states(states) if states else None)

    def planned_states(self, num_ranks: int) -> Mapping[str, tuple[torch.dtype, float]]:
        """Returns the states of the compressed phase in a job of so many ranks: name -> dtype, and number of elements
        for each element of a parameter. `exp_avg` is what is sent.
        """
        residual = self.compression.residual_dtype
        return {
            "exp_avg": (torch.float32, 1.0),
            "exp_avg_sq": (torch.float32, 1.0),
            "worker_residual": (residual, 1.0),
            "server_residual": (residual, 1.0 / num_ranks),
        }


def _grad_or_zeros(entry: Entry) -> Tensor:
    return torch.zeros_like(entry.values) if entry.grad is None else entry.grad
