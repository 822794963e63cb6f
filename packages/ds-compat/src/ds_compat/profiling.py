"""`deepspeed.profiling.flops_profiler`: DeepSpeed's calls, answered by ds_profiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_profiler import flops as ds_flops
from ds_profiler.flops.report import Job, seconds_text

_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


class FlopsProfiler:
    """Profiles `model` between `start_profile` and `stop_profile`. Totals are those of the forward."""

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self._profiler: ds_flops.FlopsProfiler | None = None

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Forgets an earlier profile and begins a new one."""
        self._profiler = ds_flops.FlopsProfiler(self.model, ignore=tuple(ignore_list or ()))
        self._profiler.start()
        self.started = True

    def stop_profile(self) -> None:
        """Ends recording; the results stay until `end_profile`."""
        if self._profiler is not None:
            self._profiler.stop()

    def reset_profile(self) -> None:
        """Forgets what was recorded; goes on if it was recording."""
        if self._profiler is not None:
            self._profiler.reset()
            self._profiler.start()

    def end_profile(self) -> None:
        """Ends recording and forgets the results."""
        self.stop_profile()
        self._profiler = None
        self.started = False

    def get_total_flops(self, as_string: bool = False) -> float | str:
        return _or_text(self._profile().forward.flops, as_string, flops_to_string)

    def get_total_macs(self, as_string: bool = False) -> float | str:
        return _or_text(self._profile().forward.macs, as_string, macs_to_string)

    def get_total_duration(self, as_string: bool = False) -> float | str:
        return _or_text(self._profile().model.forward_s, as_string, duration_to_string)

    def get_total_params(self, as_string: bool = False) -> float | str:
        return _or_text(self._profile().model.params, as_string, params_to_string)

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        job = Job(step=profile_step, recompute_factor=self.recompute_fwd_factor)
        report = ds_flops.text(
            self._profile(), depth=module_depth, top=top_modules, detailed=detailed, job=job
        )
        _write(report, output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        _write(ds_flops.text(self._profile(), depth=module_depth, top=top_modules, detailed=False), None)

    def _profile(self) -> ds_flops.Profile:
        if self._profiler is None:
            raise RuntimeError(
                "there is no profile: call start_profile(), run the model, then stop_profile()"
            )
        return self._profiler.profile()


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[float | str, float | str, int | str]:
    """Runs the model in evaluation mode on `args` and `kwargs`, or on ones of shape `input_shape`. Returns FLOPs, MACs
    and parameters of one forward, as numbers or as text.
    """
    if input_shape is not None:
        if args or kwargs:
            raise ValueError("get_model_profile takes input_shape, or args and kwargs, not both")
        one = next(model.parameters(), torch.empty(()))
        args = [torch.ones(tuple(input_shape), dtype=one.dtype, device=one.device)]
    elif not args and not kwargs:
        raise ValueError("get_model_profile needs input_shape, or args or kwargs for the model")
    if mode not in ("forward", "generate"):
        raise ValueError(f'mode is "{mode}": it must be "forward" or "generate"')
    was_training = model.training
    model.eval()
    try:
        profile = ds_flops.profile_model(
            model,
            args,
            kwargs,
            warm_up=warm_up,
            mode="generate" if mode == "generate" else "forward",
            ignore=tuple(ignore_modules or ()),
        )
    finally:
        model.train(was_training)
    if print_profile:
        _write(ds_flops.text(profile, depth=module_depth, top=top_modules, detailed=detailed), output_file)
    work, params = profile.forward, profile.model.params
    if as_string:
        return number_to_string(work.flops), macs_to_string(work.macs), params_to_string(params)
    return work.flops, work.macs, params


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    return _scaled(num, units, precision, "")


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    return _scaled(flops, units, precision, "FLOPS")


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    return _scaled(macs, units, precision, "MACs")


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    return _scaled(params_num, units.replace("B", "G") if units else units, precision, "").rstrip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    if units is None:
        return seconds_text(duration, precision)
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[units]
    return f"{duration / scale:.{precision}f} {units}"


def _scaled(value: float, units: str | None, precision: int, name: str) -> str:
    if units is None:
        return ds_flops.count_text(value, name, precision)
    prefix = units.removesuffix(name)
    return f"{value / _SCALE[prefix.upper()]:.{precision}f} {prefix}{name}".rstrip()


def _or_text(value: float, as_string: bool, show: Any) -> float | str:
    return str(show(value)) if as_string else value


def _write(report: str, output_file: str | None) -> None:
    if output_file is None:
        print(report)  # noqa: T201 -- what this call is for
        return
    path = Path(output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report + "\n", encoding="utf-8")
