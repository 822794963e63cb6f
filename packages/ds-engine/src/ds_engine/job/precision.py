"""The dtypes of computation and gradient sums, and the loss scaling of a job."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_engine.config.sections.model import DsConfig
from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.suggest import did_you_mean

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAFE_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that `torch.autocast` runs in the lower precision: their parameters can be stored and sent in it."""

DtypeFor = Callable[[str, nn.Parameter], torch.dtype | None]


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How losses are scaled before backward. With the constant 1 they are not scaled, but steps whose gradient is not
    finite are skipped.
    """

    initial: float = 1.0
    dynamic: bool = False
    """Whether the scale is dynamic. If not, the fields below are unused."""
    window: int = 1000
    """Number of steps without overflow after which the scale is doubled."""
    hysteresis: int = 2
    """Number of overflows until the scale is halved."""
    consecutive_hysteresis: bool = False
    """Whether a step without overflow restores the hysteresis."""
    minimum: float = 1.0
    raise_at_minimum: bool = True
    """Whether an overflow at the smallest scale raises an error. False: the step is skipped, and training continues."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The precision that the sections `fp16`, `bf16`, `torch_autocast` and `data_types` configure."""

    param_dtype: torch.dtype | None = None
    """Compute dtype of parameters, which then have fp32 masters; None: the dtype of the model."""
    autocast_dtype: torch.dtype | None = None
    """Dtype of `torch.autocast` around forward; None: no autocast."""
    safe_modules: tuple[type[nn.Module], ...] = SAFE_MODULES
    """With autocast: classes whose parameters are stored and sent in `autocast_dtype`."""
    cast_inputs: bool = False
    """Whether floating-point arguments of forward are cast to `param_dtype`."""
    grad_dtype: torch.dtype = torch.float32
    """Dtype in which gradients of micro-batches are summed."""
    buffer_dtype: torch.dtype | None = None
    """Dtype of the module's buffers; None: unchanged."""
    keep_fp32: tuple[str, ...] | None = None
    """Patterns of the names of buffers that always stay in fp32; None: the patterns of the model, if it has some."""
    loss_scaling: LossScaling | None = LossScaling()
    """None: losses are not scaled, and no step is skipped."""

    @classmethod
    def of(cls, config: DsConfig, device_type: str = "cpu") -> Precision:
        """Reads the four sections.

        Args:
            device_type: determines the default dtype of `torch_autocast`.

        Raises:
            ConfigError: a class in lower_precision_safe_modules that does not exist.
        """
        cast, types = config.torch_autocast, config.data_types
        param = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
        auto = DTYPES[cast.dtype] if cast.dtype is not None else torch.get_autocast_dtype(device_type)
        autocast = auto if cast.enabled else None
        scaling: LossScaling | None = LossScaling()
        if torch.float16 in (param, autocast):
            scaling = _loss_scaling(config)
        elif config.bf16.enabled and not config.bf16.check_grad_overflow:
            scaling = None
        return cls(
            param_dtype=param,
            autocast_dtype=autocast,
            safe_modules=_classes(cast.lower_precision_safe_modules) if autocast is not None else (),
            cast_inputs=config.bf16.enabled or (config.fp16.enabled and config.fp16.auto_cast),
            grad_dtype=DTYPES[types.grad_accum_dtype or "fp32"],
            buffer_dtype=DTYPES[types.buffer_dtype] if types.buffer_dtype is not None else None,
            keep_fp32=None if types.keep_in_fp32_modules == "auto" else tuple(types.keep_in_fp32_modules),
            loss_scaling=scaling,
        )

    def dtype_for(self, module: nn.Module) -> DtypeFor | None:
        """Returns a function from a parameter's name and the parameter to the dtype in which it is stored and sent;
        None: all have `param_dtype`.
        """
        if self.autocast_dtype is None or self.param_dtype is not None:
            return None
        return lowered(module, self.safe_modules, self.autocast_dtype)

    def cast_buffers(self, module: nn.Module) -> None:
        """Casts the buffers to their dtypes, and replaces them in the module."""
        half = self.param_dtype or torch.float32
        kept = _matcher(module, self.keep_fp32, half) if half != torch.float32 else None
        for prefix, owner in module.named_modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if not buffer.is_floating_point():
                    continue
                full = f"{prefix}.{name}" if prefix else name
                wanted = torch.float32 if kept is not None and kept(full) else self.buffer_dtype
                if wanted is not None and buffer.dtype != wanted:
                    buffer.data = buffer.data.to(wanted)

    def around_forward(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """Returns the context for the module's forward."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def cast(self, value: Any) -> Any:
        """Casts the floating-point tensors in `value` (inside lists, tuples and dicts) to the compute dtype."""
        if not self.cast_inputs:
            return value
        if isinstance(value, Tensor):
            return value.to(self.param_dtype) if value.is_floating_point() else value
        if type(value) is dict:
            return {key: self.cast(inner) for key, inner in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.cast(inner) for inner in value))
        if type(value) in (list, tuple):
            return type(value)(self.cast(inner) for inner in value)
        return value

    def __str__(self) -> str:
        if self.param_dtype is not None:
            told = f"{name_of(self.param_dtype)}, with fp32 masters"
        elif self.autocast_dtype is not None:
            told = f"torch.autocast to {name_of(self.autocast_dtype)}"
        else:
            told = "dtype of the model, usually fp32"
        told += f"; gradients summed in {name_of(self.grad_dtype)}"
        scaling = self.loss_scaling
        if scaling is not None and scaling.dynamic:
            told += f"; loss scale from {scaling.initial:g}, dynamic"
        elif scaling is not None and scaling.initial != 1.0:
            told += f"; loss scale {scaling.initial:g}"
        return told


def name_of(dtype: torch.dtype) -> str:
    """Returns fp16, bf16, fp32, or torch's name of another dtype."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def _loss_scaling(config: DsConfig) -> LossScaling:
    section = config.fp16
    if section.loss_scale > 0:
        return LossScaling(initial=section.loss_scale)
    return LossScaling(
        dynamic=True,
        initial=2.0**section.initial_scale_power,
        window=section.loss_scale_window,
        hysteresis=section.hysteresis,
        consecutive_hysteresis=section.consecutive_hysteresis,
        minimum=float(section.min_loss_scale),
        raise_at_minimum=config.zero_optimization.stage
        > 0,  # as in DeepSpeed, whose fp16 without ZeRO continues
    )


def _classes(names: Iterable[str] | None) -> tuple[type[nn.Module], ...]:
    if names is None:
        return SAFE_MODULES
    classes, wrong = [], []
    for name in names:
        home, _, last = name.rpartition(".")
        try:
            module = importlib.import_module(home) if home else None
        except ImportError:
            module = None
        cls = getattr(module, last, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            classes.append(cls)
        else:
            near = did_you_mean(last, dir(module)) if module is not None else ""
            wrong.append(
                f'torch_autocast.lower_precision_safe_modules: "{name}" is not a module class; write the full '
                "name, "
                f'for example "torch.nn.Linear".{near}'
            )
    if wrong:
        raise ConfigError(wrong)
    return tuple(classes)


def lowered(module: nn.Module, safe: tuple[type[nn.Module], ...], dtype: torch.dtype) -> DtypeFor:
    """Returns a function that assigns `dtype` to fp32 parameters which belong only to modules of exactly the classes
    `safe`.

    Autocast would cast these in every forward. Stored in that dtype, they need no copy, and are sent in half the
    bytes. A weight that a head shares with an embedding is not cast, since the embedding computes in the dtype of its
    parameter.
    """
    holders: dict[int, list[type]] = {}
    for owner in module.modules():
        for param in owner.parameters(recurse=False):
            holders.setdefault(id(param), []).append(type(owner))

    def dtype_for(_: str, param: nn.Parameter) -> torch.dtype | None:
        all_safe = all(cls in safe for cls in holders.get(id(param), [object]))
        return dtype if all_safe and param.dtype == torch.float32 else None

    return dtype_for


def _matcher(
    module: nn.Module, patterns: tuple[str, ...] | None, dtype: torch.dtype
) -> Callable[[str], bool] | None:
    """Returns a predicate for the names of buffers that stay in fp32. `*` in a pattern matches anything, and a
    pattern may match anywhere in a name, as in transformers, whose models have such patterns
    (`_keep_in_fp32_modules_strict`, and in fp16 also `_keep_in_fp32_modules`).
    """
    if patterns is not None:
        sources = [re.escape(p).replace(r"\*", ".*") for p in patterns]
    else:
        sources = []
        for prefix, owner in module.named_modules():
            names = list(getattr(owner, "_keep_in_fp32_modules_strict", None) or ())
            if dtype == torch.float16:
                names += getattr(owner, "_keep_in_fp32_modules", None) or ()
            start = f"^{re.escape(prefix)}\\..*" if prefix else ""
            sources += [start + re.escape(n).replace(r"\*", ".*") for n in names]
    if not sources:
        return None
    combined = re.compile("|".join(sorted(set(sources))))
    return lambda name: combined.search(name) is not None
