"""The optimizer that `deepspeed.initialize` returns: a wrapper of the torch optimizer with DeepSpeed's attributes.

The engine steps the wrapped torch optimizer; code reads attributes of the wrapper: `overflow`, `cur_scale`, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import ds_engine
import ds_zero
from ds_compat.config.deepspeed_config import DeepSpeedConfig

_COUNTERS = frozenset({"cur_iter", "scale_window", "min_loss_scale", "last_overflow_iter", "scale_factor"})


class DeepSpeedOptimizer(Optimizer):
    """A wrapper of the engine's optimizer, which shares its groups, states and hooks."""

    custom_loss_scaler = False
    external_loss_scale: float | None = None

    _engine: ds_engine.Engine
    optimizer: Optimizer

    def __init__(
        self, engine: ds_engine.Engine
    ) -> None:  # without super(): groups and state are the inner optimizer's
        vars(self).update(optimizer=engine.optimizer, _engine=engine)

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_engine"):
            raise AttributeError(name)
        if name in _COUNTERS:  # older versions of DeepSpeed have these as attributes of the optimizer
            return getattr(self.loss_scale_config, name)
        return getattr(self.optimizer, name)

    param_groups = property(
        lambda self: self.optimizer.param_groups, lambda self, v: setattr(self.optimizer, "param_groups", v)
    )
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates immediately, without the engine's clipping and schedule."""
        self.optimizer.step(closure) if closure is not None else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], *_: Any, **__: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        self._engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    @property
    def overflow(self) -> bool:
        """Whether the last update was skipped because a gradient was not finite."""
        return bool(self._engine.scaler.step_was_skipped)

    @property
    def loss_scale_config(self) -> SimpleNamespace:
        """The loss scale and its counters."""
        section, scaler = self._engine.config.fp16, self._engine.scaler.state_dict()
        return SimpleNamespace(
            use_grad_scaling=section.enabled,
            dynamic_loss_scale=self.dynamic_loss_scale,
            cur_scale=self.loss_scale,
            cur_iter=scaler.get("steps", 0),
            cur_hysteresis=scaler.get("hysteresis_left", 1),
            last_overflow_iter=scaler.get("last_overflow"),
            scale_factor=2.0,
            scale_window=section.loss_scale_window,
            min_loss_scale=section.min_loss_scale,
        )

    @property
    def low_precision_dtype(self) -> torch.dtype | None:
        return self._engine.precision.param_dtype

    @property
    def fp32_groups(self) -> list[list[Tensor]]:
        """This rank's shards of the masters, by group."""
        return [list(group["params"]) for group in self.optimizer.param_groups]

    @property
    def fp32_partitioned_groups_flat(self) -> list[Tensor]:
        """The same in one list, 1-D each; keys of `optimizer.state`."""
        return [part for group in self.fp32_groups for part in group]

    fp32_groups_flat = single_partition_of_fp32_groups = fp32_partitioned_groups_flat

    @property
    def bit16_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters, by group of the optimizer and in the order of `fp32_groups`."""
        named = dict(self._engine.module.named_parameters())
        names = ds_zero.group_names(self._engine.module, self.optimizer)
        return [[named[name] for name in group] for group in names]

    fp16_groups = bit16_groups

    @property
    def averaged_gradients(self) -> dict[int, list[Tensor] | None]:
        """This rank's part of the reduced gradients, by index of the group; None for a group that has none."""
        parts = {i: [p.grad for p in group if p.grad is not None] for i, group in enumerate(self.fp32_groups)}
        return {i: grads or None for i, grads in parts.items()}

    @property
    def loss_scale(self) -> float:
        return self._engine.loss_scale

    cur_scale = loss_scale

    def get_loss_scale(self) -> float:
        return self.loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        section = self._engine.config.fp16
        return section.enabled and section.loss_scale == 0

    @property
    def _global_grad_norm(self) -> float | None:
        return self._engine.get_global_grad_norm()

    def scale_if_loss(self, value: Tensor) -> Tensor:
        return value * self.loss_scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class ZeROOptimizer(DeepSpeedOptimizer):
    """Stages 1 to 3."""

    def offload_states(
        self, include: Any = None, device: Any = "cpu", pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """Same as `DeepSpeedEngine.offload_states`."""
        self._engine.offload_states(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        self._engine.reload_states(non_blocking)


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """Stages 1 and 2."""

    @property
    def bit16_groups_flat(self) -> list[Tensor]:
        """The memory of the groups' parameters: one 1-D tensor per bucket, in the order of the groups. The parameters
        are views of it, and every step overwrites it.
        """
        return flat_memory(param for group in self.bit16_groups for param in group)

    @property
    def accumulated_grads_in_cpu(self) -> dict[int, Tensor]:
        """Returns an empty dict: no whole gradients are kept in host memory, since each rank keeps only its parts."""
        return {}


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer):
    """Stage 3."""

    @property
    def fp16_partitioned_groups_flat(self) -> list[Tensor]:
        """This rank's 1-D slice of every parameter of the groups, in the parameter's dtype."""
        presences = (ds_zero.presence(param) for group in self.bit16_groups for param in group)
        return [held.own for held in presences if held is not None and held.own is not None]

    @property
    def parameter_offload(self) -> ParameterHooks:
        """The hooks that code removes before generation with gathered parameters, and registers again afterwards."""
        return ParameterHooks(self._engine.module)


class ParameterHooks:
    """The hooks that gather parameters, with the attributes that TRL uses to remove them for a while. Its lists are
    empty: hooks need not be removed, since they do nothing while parameters are gathered.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = ModuleView(module)
        self.forward_hooks: list[RemovableHandle] = []
        self.backward_hooks: list[RemovableHandle] = []
        self.param_coordinator = FetchTrace()

    def _register_deepspeed_module(self, module: nn.Module, count: list[int] | None = None) -> None:
        """Does nothing: hooks stay registered."""


class ModuleView:
    """A view of a module with the attributes that DeepSpeed adds to modules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def ds_external_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns an empty list: ds_zero detects parameters of other modules automatically."""
        return iter(())


class FetchTrace:
    """The order in which modules fetch parameters. ds_zero detects changes of it automatically."""

    def is_invalid_trace(self) -> bool:
        return True

    def is_record_trace(self) -> bool:
        return False

    def is_complete_trace(self) -> bool:
        return False

    def _invalidate_trace(self) -> None:
        """Does nothing."""


class FP16_Optimizer(DeepSpeedOptimizer):
    """fp16 at stage 0."""


class FP16_UnfusedOptimizer(DeepSpeedOptimizer):
    """bf16 at stage 0, and fp16 with optimizers that need whole tensors."""


class BF16_Optimizer(ZeROOptimizer):
    """A class of DeepSpeed that no configuration uses here."""


def flat_memory(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Returns a 1-D tensor for each storage of `params`, from the first to the last element that they use."""
    seen: dict[int, tuple[Tensor, int, int]] = {}
    for param in params:
        value = param.detach()
        begin = int(value.storage_offset())
        key = value.untyped_storage().data_ptr()
        _, first, last = seen.get(key, (value, begin, begin))
        seen[key] = value, min(first, begin), max(last, begin + value.numel())
    return [value.as_strided((last - first,), (1,), first) for value, first, last in seen.values()]


def wrap(engine: ds_engine.Engine, config: DeepSpeedConfig) -> Optimizer:
    """Returns the optimizer itself for fp32 at stage 0, as in DeepSpeed; else a wrapper of DeepSpeed's class for the
    configuration.
    """
    stage = engine.config.zero_optimization.stage
    dtype = engine.precision.param_dtype or torch.float32
    if stage == 3:
        return DeepSpeedZeroOptimizer_Stage3(engine)
    if stage > 0:
        return DeepSpeedZeroOptimizer(engine)
    if dtype == torch.float16:
        return FP16_Optimizer(engine)
    if dtype == torch.bfloat16:
        return FP16_UnfusedOptimizer(engine)
    return engine.optimizer
