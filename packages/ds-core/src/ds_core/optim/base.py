"""The base of the fused optimizers: states, batches of tensors with the same step, and torch's optimizer interface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ds_core import arena, kernels
from ds_core.formats import StepFormats
from ds_core.optim import counters

Group = dict[str, Any]

NO_CORRECTION_STEP = 2**53
"""A step so large that beta ** step is 0 for every beta below 1 - 1e-12: the bias correction is then 1."""

ARENA_BYTES = 1 << 20
"""CPU states of at least this size are allocated in the arena; smaller ones gain nothing from huge pages."""


@dataclass
class Batch:
    """Tensors of one group with the same device and step: the arguments of one kernel call. 1-D or contiguous."""

    step: int
    """Number of this update, from 1."""
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a state -> one tensor per parameter."""
    out: list[Tensor | None] = field(default_factory=list)
    """Tensors that receive copies of the new parameters: one entry per tensor, or an empty list."""
    rows: list[int] = field(default_factory=list)
    """Index of each tensor in the list that was passed."""
    checksums: kernels.Checksums | None = None
    """Where the checksums of the tensors go; None: none are computed."""
    formats: StepFormats | None = None
    """How the kernel reads and writes what is not fp32."""

    def outs(self) -> list[Tensor | None] | None:
        """`out`, or None if no tensor is copied."""
        return self.out if any(o is not None for o in self.out) else None

    def split(self, steps: Sequence[int]) -> list[Batch]:
        """Splits the batch by step, given one step per tensor. Usually the result is this batch alone."""
        first = self.params[0].get_device()
        if len(set(steps)) == 1 and all(p.get_device() == first for p in self.params):
            self.step = steps[0]
            return [self]
        parts: dict[tuple[torch.device, int], Batch] = {}
        for i, (param, step) in enumerate(zip(self.params, steps, strict=True)):
            part = parts.setdefault(
                (param.device, step), Batch(step, states={name: [] for name in self.states})
            )
            part.params.append(param)
            part.grads.append(self.grads[i])
            part.rows.append(self.rows[i])
            for name, states in self.states.items():
                part.states[name].append(states[i])
            if self.out:
                part.out.append(self.out[i])
        return list(parts.values())


class FusedOptimizer(Optimizer):
    """Base of the fused optimizers.

    Parameters are fp32; gradients (`p.grad`) fp32. Parameters without gradient or without elements are skipped.
    States carry torch's names; "step" is a 0-dim fp32 CPU tensor.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    checksums_in_pass: ClassVar[bool] = True
    """Whether `_apply` passes `Batch.checksums` to the kernel."""
    sums_narrow: ClassVar[bool] = False
    """Whether it does so for 16-bit parameters, too."""
    state_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    """Dtypes in which states may be kept."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        state_dtype: torch.dtype = torch.float32,
        *,
        bias_correction: bool = True,
    ) -> None:
        if state_dtype not in self.state_dtypes:
            able = " or ".join(str(dtype) for dtype in self.state_dtypes)
            raise ValueError(f"state_dtype must be {able}, but is {state_dtype}")
        self._state_dtype = state_dtype
        # Not in the groups: loading a state dict of torch's, whose groups have no such entry, would turn it on again.
        self._bias_correction = bias_correction
        self._places: dict[int, tuple[int, int]] = {}
        super().__init__(params, defaults)

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the element-wise states."""
        return self._state_dtype

    def _corrected_step(self, batch: Batch) -> int:
        """The step t of Adam's bias correction."""
        return batch.step if self._bias_correction else NO_CORRECTION_STEP

    # -- implemented by a subclass

    @abstractmethod
    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        """Calls the kernel with the group's options. `grad_scale` is negative if the group maximizes."""

    def new_state(self, param: Tensor) -> Tensor:
        """Returns a zero-filled state for `param`, in its memory order. Override it to allocate states elsewhere."""
        if param.device.type == "cpu" and param.numel() * self._state_dtype.itemsize >= ARENA_BYTES:
            return arena.zeros(param.numel(), self._state_dtype).as_strided(param.size(), param.stride())
        return torch.zeros_like(param, dtype=self._state_dtype)

    def new_named_state(self, param: Tensor, name: str) -> Tensor:
        """Returns a zero-filled state of this name. Override it if states have several dtypes."""
        return self.new_state(param)

    def _formats(self, batch: Batch) -> StepFormats | None:
        """How the kernel treats what is not fp32."""
        return None

    # -- stepping

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient. `closure` re-evaluates the model and returns the loss."""
        if type(self).step is FusedOptimizer.step and self._is_watched():
            return self._watched_step() if closure is None else self._watched_step(closure)
        return self._plain_step(closure)

    def _plain_step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            self._step_group(group, params, None, 1.0)
        return loss

    # [Note: unwrapped step] torch wraps the `step` of every optimizer for hooks and profilers. Without either, the
    # wrapper still takes some 25 us per call, as long as the kernel on 100,000 parameters. `step.hooked` (below)
    # prevents the wrapping; the wrapper is called only if hooks or a profiler are active. A subclass that overrides
    # `step` gets torch's wrapper.
    _watched_step = Optimizer.profile_hook_step(_plain_step)

    def _is_watched(self) -> bool:
        """Whether step hooks are registered or a profiler runs."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    def step_fused(
        self, params: Sequence[Tensor], *, grad_scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        """Steps exactly `params`, any subset of this optimizer's parameters, reading `p.grad`.

        In one pass over memory, each gradient is multiplied by `grad_scale` (0-dim), the parameter is updated, and
        `out[i]`, unless None, receives `params[i]` rounded to its dtype. No step hooks run.
        """
        self._step_fused(params, grad_scale, out, None)

    def _step_fused(
        self,
        params: Sequence[Tensor],
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        checksums: kernels.Checksums | None,
    ) -> None:
        if len(out) != len(params):
            raise ValueError(f"step_fused: out has {len(out)} entries, but params has {len(params)}")
        scale = float(grad_scale)
        for index, places in self._by_group(params).items():
            members, copies = [params[i] for i in places], [out[i] for i in places]
            mine = None
            if checksums is not None:
                mine = [checksums[0][i] for i in places], [checksums[1][i] for i in places]
            self._step_group(self.param_groups[index], members, copies, scale, mine)

    # -- checksums

    def checksums(self, tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Writes the checksums of each tensor's blocks to `out`: see `ds_core.kernels.checksums`."""
        flat = [_in_memory_order(t) for t in tensors]
        kernels.checksums([t.view(torch.bfloat16) if t.dtype == torch.int16 else t for t in flat], out)

    def checksummed_states(self, param: Tensor) -> tuple[str, ...]:
        """Returns the names of the element-wise states of one parameter."""
        index = self._group_of(param)
        if index is None:
            raise ValueError("checksummed_states: the parameter is in no parameter group of this optimizer")
        return self._names(self.param_groups[index])

    def step_checksummed(
        self,
        params: Sequence[Tensor],
        *,
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        read: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        """As `step_fused`, and computes the checksums of what it reads and of what it writes.

        Args:
            read: one int64 tensor of zeros for each parameter, of shape (rows, blocks). Rows: the gradient, the
                parameter, its states in the order of `checksummed_states`. A parameter without a gradient is skipped.
            written: the same for the new values; the row of the gradient is not written.

        On the CPU the element-wise optimizers compute both while they update a range that is in the cache; others, and
        all optimizers on a GPU, in passes before and after the update.
        """
        if self._sums_in_pass(params):
            self._step_fused(params, grad_scale, out, (read, written))
            return
        self._sum_rows(params, read, with_grads=True)
        self._step_fused(params, grad_scale, out, None)
        self._sum_rows(params, written, with_grads=False)

    def _sums_in_pass(self, params: Sequence[Tensor]) -> bool:
        """Whether the kernel computes the checksums of these parameters in its pass over memory."""
        return self.checksums_in_pass and all(
            kernels.checksums_in_pass(p) and (p.dtype == torch.float32 or self.sums_narrow) for p in params
        )

    def _sum_rows(self, params: Sequence[Tensor], sums: Sequence[Tensor], *, with_grads: bool) -> None:
        tensors: list[Tensor] = []
        rows: list[Tensor] = []
        for param, own in zip(params, sums, strict=True):
            if param.grad is None or not param.numel():
                continue
            held = self.state.get(param) or {}
            values = [param.grad if with_grads else None, param]
            values += [held.get(name) for name in self.checksummed_states(param)]
            for value, row in zip(values, own, strict=True):
                if value is not None:
                    tensors.append(value)
                    rows.append(row)
        self.checksums(tensors, rows)

    def _by_group(self, params: Sequence[Tensor]) -> dict[int, list[int]]:
        """Index of each group -> indices in `params` of its parameters."""
        places: dict[int, list[int]] = {}
        for i, param in enumerate(params):
            index = self._group_of(param)
            if index is None:
                raise ValueError(f"step_fused: params[{i}] is in no parameter group of this optimizer")
            places.setdefault(index, []).append(i)
        return places

    def _group_of(self, param: Tensor) -> int | None:
        """Returns the index of the parameter's group. Cached positions are verified before use."""
        for _ in range(2):
            place = self._places.get(id(param))
            if place is not None and place[0] < len(self.param_groups):
                members = self.param_groups[place[0]]["params"]
                if place[1] < len(members) and members[place[1]] is param:
                    return place[0]
            self._places = {
                id(p): (index, position)
                for index, group in enumerate(self.param_groups)
                for position, p in enumerate(group["params"])
            }
        return None

    def _step_group(
        self,
        group: Group,
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        batches, counts = self._batches(group, params, out)
        for batch in batches:
            if checksums is not None:
                read, written = checksums
                batch.checksums = [read[i] for i in batch.rows], [written[i] for i in batch.rows]
            batch.formats = self._formats(batch)
            self._apply(group, batch, -grad_scale if group.get("maximize", False) else grad_scale)
        counters.advance(counts)  # after the kernels: an error in a kernel must leave the counters unchanged

    def _batches(
        self, group: Group, params: Sequence[Tensor], out: Sequence[Tensor | None] | None
    ) -> tuple[list[Batch], list[Tensor]]:
        """Returns the batches for the kernels, and the step counters to advance afterwards."""
        names = self._names(group)
        batch = Batch(0, states={name: [] for name in names})
        columns = [batch.states[name] for name in names]
        steps: list[int | None] = []  # None: use the counter in the state
        counts: list[Tensor] = []
        for i, param in enumerate(params):
            grad = param.grad
            if grad is None:
                continue
            state = self.state.get(param)
            if not state and param.numel() == 0:
                continue
            state, step = self._prepare(param, group)
            steps.append(step)
            if step is None:
                counts.append(state["step"])
            batch.rows.append(i)
            if out is not None:
                batch.out.append(out[i])
            if grad.is_contiguous() and param.is_contiguous():  # states are as the parameter; kernels check
                batch.params.append(param)
                batch.grads.append(grad)
                for name, column in zip(names, columns, strict=True):
                    column.append(state[name])
            else:
                with torch.no_grad():
                    batch.params.append(_in_memory_order(param))
                    batch.grads.append(_like(grad, param))
                    for name, column in zip(names, columns, strict=True):
                        column.append(_in_memory_order(state[name]))
        if not batch.params:
            return [], []
        counted = iter(counters.read(counts))
        numbers = [next(counted) + 1 if step is None else step for step in steps]
        return batch.split(numbers), counts

    def _names(self, group: Group) -> tuple[str, ...]:
        """The names of the states that the group's options need."""
        return self.state_names

    def _prepare(self, param: Tensor, group: Group) -> tuple[dict[str, Any], int | None]:
        """Returns the parameter's state, created on first use, and the number of this update if the state has no
        counter.
        """
        state = cast(dict[str, Any], self.state[param])
        if not state:
            with torch.no_grad():
                state["step"] = torch.zeros((), dtype=torch.float32)
                for name in self._names(group):
                    state[name] = self.new_named_state(param, name)
        return state, None

    # -- methods of torch.optim.Optimizer. [Note: no import of torch._dynamo] torch wraps these four methods, so that
    # their first call imports torch._dynamo, which takes seconds and some hundred MB. Nothing in them is compiled, so
    # the wrapped functions are called directly.

    def add_param_group(self, param_group: Group) -> None:
        """As `torch.optim.Optimizer.add_param_group`."""
        _unwrapped(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        _unwrapped(Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`."""
        return cast(dict[str, Any], _unwrapped(Optimizer.state_dict)(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`. States are copied into this optimizer's own tensors."""
        _unwrapped(Optimizer.load_state_dict)(self, state_dict)
        # torch casts every state to the parameter's dtype, which loses bits of fp32 states of 16-bit parameters.
        saved = dict(
            zip(
                (p for group in self.param_groups for p in group["params"]),
                (
                    state_dict["state"].get(i, {})
                    for group in state_dict["param_groups"]
                    for i in group["params"]
                ),
                strict=True,
            )
        )
        for param, state in self.state.items():
            own = saved.get(param, {})
            names = [name for name in self._kept_names() if own.get(name) is not None]
            state.update(self._loaded_states(param, {name: own[name] for name in names}))
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu").clone()
        self._check_groups()

    def _kept_names(self) -> tuple[str, ...]:
        """Names of the element-wise states that any options need."""
        return self.state_names

    def _loaded_states(self, param: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies the states of one parameter from a state dict to tensors of this optimizer's own."""
        return {name: self.new_named_state(param, name).copy_(value) for name, value in saved.items()}

    def _check_groups(self) -> None:
        """Raises ValueError if loaded groups have an option that the kernel does not support."""

    def __getstate__(self) -> dict[str, Any]:
        own = {"_state_dtype": self._state_dtype, "_bias_correction": self._bias_correction, "_places": {}}
        return {**super().__getstate__(), **own}


FusedOptimizer.step.hooked = True  # type: ignore[attr-defined]  # [Note: unwrapped step]


def check_not_negative(**options: float) -> None:
    """Raises ValueError naming the first option below 0 (or NaN)."""
    for name, value in options.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, but is {value}")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises ValueError unless both lie in [0, 1)."""
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must lie in [0, 1), but are {betas}")


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], getattr(function, "__wrapped__", function))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Returns a contiguous view of the same memory, which is enough for element-wise kernels on e.g. a channels_last
    tensor.
    """
    if tensor.is_contiguous():
        return tensor
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"the fused optimizers need parameters without gaps in memory, but one of shape {tuple(tensor.shape)} "
            f"has strides {tensor.stride()}; use parameter.data = parameter.data.contiguous() before training"
        )
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """Returns the gradient with its elements in the parameter's memory order."""
    if grad.is_sparse:
        raise ValueError(
            "the fused optimizers take no sparse gradients; use sparse=False or torch.optim.SparseAdam"
        )
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return _in_memory_order(grad)
