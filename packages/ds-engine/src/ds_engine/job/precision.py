"""In which dtypes the model computes and gradients are summed, and what guards a step against overflow."""

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
"""Modules that `torch.autocast` computes in the lower precision: their parameters may rest and travel in it."""

DtypeFor = Callable[[str, nn.Parameter], torch.dtype | None]


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How losses are scaled before backward. With the constant 1 they are not, and a step is left out all the same
    whose gradient is not finite.
    """

    initial: float = 1.0
    dynamic: bool = False
    """The scale follows overflows; otherwise it stays as it is, and the fields below mean nothing."""
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows before the scale is halved."""
    consecutive_hysteresis: bool = False
    """A step without overflow restores the hysteresis."""
    minimum: float = 1.0
    raise_at_minimum: bool = True
    """An overflow at the smallest scale is an error; False: the step is left out, and training goes on."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the sections `fp16`, `bf16`, `torch_autocast` and `data_types` ask for."""

    param_dtype: torch.dtype | None = None
    """In which parameters compute, with fp32 masters behind them; None: as the model is."""
    autocast_dtype: torch.dtype | None = None
    """`torch.autocast` around forward; None: none."""
    safe_modules: tuple[type[nn.Module], ...] = SAFE_MODULES
    """With autocast: classes whose parameters rest and travel in `autocast_dtype`."""
    cast_inputs: bool = False
    """Cast floating-point arguments of forward to `param_dtype`."""
    grad_dtype: torch.dtype = torch.float32
    """In which gradients of micro-batches are summed."""
    buffer_dtype: torch.dtype | None = None
    """Of the module's buffers; None: they stay as they are."""
    keep_fp32: tuple[str, ...] | None = None
    """Patterns of names of buffers that are fp32 in any case; None: the model's own, if it has some."""
    loss_scaling: LossScaling | None = LossScaling()
    """None: losses are not scaled, and every step is taken."""

    @classmethod
    def of(cls, config: DsConfig, device_type: str = "cpu") -> Precision:
        """Read the four sections.

        Args:
            device_type: decides the dtype of `torch_autocast` where the section has none.

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
        """From a parameter's name and the parameter to the dtype in which it rests and travels; None: every
        parameter has `param_dtype`.
        """
        if self.autocast_dtype is None or self.param_dtype is not None:
            return None
        return lowered(module, self.safe_modules, self.autocast_dtype)

    def cast_buffers(self, module: nn.Module) -> None:
        """Bring the buffers into their dtypes, each in place of what was there."""
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
        """The context in which the module computes."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def cast(self, value: Any) -> Any:
        """`value` with the floating-point tensors in it (inside lists, tuples and dicts) in the compute
        dtype.
        """
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
            told = "as the model is, usually fp32"
        told += f"; gradients summed in {name_of(self.grad_dtype)}"
        scaling = self.loss_scaling
        if scaling is not None and scaling.dynamic:
            told += f"; loss scale from {scaling.initial:g}, dynamic"
        elif scaling is not None and scaling.initial != 1.0:
            told += f"; loss scale {scaling.initial:g}"
        return told


def name_of(dtype: torch.dtype) -> str:
    """fp16, bf16, fp32; another dtype as torch writes it."""
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
        raise_at_minimum=config.zero_optimization.stage > 0,  # as DeepSpeed: its fp16 without ZeRO goes on
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
                f'torch_autocast.lower_precision_safe_modules: "{name}" is no module class; write its full name, '
                f'for example "torch.nn.Linear".{near}'
            )
    if wrong:
        raise ConfigError(wrong)
    return tuple(classes)


def lowered(module: nn.Module, safe: tuple[type[nn.Module], ...], dtype: torch.dtype) -> DtypeFor:
    """Gives `dtype` to fp32 parameters that only modules of exactly the classes `safe` hold.

    Autocast would cast these in every forward; resting in that dtype they need no copy, and travel at half the
    size. A weight that a head shares with an embedding stays: the embedding computes in its parameter's dtype.
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
    """Tells the buffers that stay in fp32: `*` in a pattern stands for anything, and it may match anywhere in a
    name, as in transformers, whose models say themselves which (`_keep_in_fp32_modules_strict`, and in fp16
    also `_keep_in_fp32_modules`).
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
