"""`deepspeed.checkpointing`: activation checkpointing of Megatron-style code, on top of ds_layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from ds_layers import Checkpointing, CheckpointingConfig, RngTracker, model_parallel_seed

_present: dict[str, Any] = {}
"""The settings of `configure`, because DeepSpeed's functions have no object that could hold them."""


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Sets where the inputs of checkpointed functions are stored from now on. Arguments take precedence over the
    section `activation_checkpointing`.
    """
    section = _section(deepspeed_config)
    given: dict[str, tuple[Any, str]] = {
        "partition": (partition_activations, "partition_activations"),
        "contiguous": (contiguous_checkpointing, "contiguous_memory_optimization"),
        "num_checkpoints": (num_checkpoints, "number_checkpoints"),
        "on_host": (checkpoint_in_cpu, "cpu_checkpointing"),
        "synchronize": (synchronize, "synchronize_checkpoint_boundary"),
    }
    options: dict[str, Any] = {
        name: value if value is not None else section.get(key) for name, (value, key) in given.items()
    }
    group = None
    if mpu_ is not None:
        ask = getattr(mpu_, "get_tensor_model_parallel_group", None) or mpu_.get_model_parallel_group
        group = ask()
    if options["partition"] and (group is None or group.size() == 1):
        options["partition"] = False  # with one model-parallel rank there is nothing to divide
    assert not options["contiguous"] or options["num_checkpoints"] is not None, (
        "contiguous_checkpointing needs the number of layers: pass num_checkpoints, or set "
        "activation_checkpointing.number_checkpoints"
    )
    options = {name: value for name, value in options.items() if value is not None}
    config = CheckpointingConfig(group=group, **options)
    _present.update(instance=Checkpointing(config, _tracker()), configured=True, switches={})


def _section(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    from ds_compat.config.deepspeed_config import read

    raw = getattr(config, "raw", None) or read(config)
    return dict(raw.get("activation_checkpointing") or {})


def _tracker() -> RngTracker:
    tracker: RngTracker = _present.setdefault("tracker", RngTracker())
    return tracker


def _instance() -> Checkpointing:
    """Returns the present `Checkpointing` object, after applying changes of the module's switches."""
    instance: Checkpointing = _present.setdefault("instance", Checkpointing(rng=_tracker()))
    switches: dict[str, Any] = _present.pop("switches", {})
    if switches:
        if instance.config.group is None:
            switches.pop("partition", None)  # ignored, as by `configure` with one model-parallel rank
        instance = _present["instance"] = Checkpointing(replace(instance.config, **switches), _tracker())
    return instance


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns `function(*args)`, which is recomputed in backward."""
    for name in ("use_reentrant", "preserve_rng_state"):  # arguments of torch, which callers may pass
        kwargs.pop(name, None)
    result = _instance()(function, *args, **kwargs)
    return result


non_reentrant_checkpoint = checkpoint


class CheckpointFunction:
    """Supports `CheckpointFunction.apply(run_function, all_outputs, *args)` of older code."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        outputs = checkpoint(run_function, *args)
        all_outputs += list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        return outputs


_SWITCHES: Mapping[str, str] = {
    "PARTITION_ACTIVATIONS": "partition",
    "CONTIGUOUS_CHECKPOINTING": "contiguous",
    "CPU_CHECKPOINT": "on_host",
    "SYNCHRONIZE": "synchronize",
    "num_layers": "num_checkpoints",
}
"""Module-level switch of DeepSpeed -> option of `ds_layers.CheckpointingConfig`."""


class _Switchable(ModuleType):
    """The class of this module. Code may assign switches of the module; they take effect at the next checkpoint."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SWITCHES:
            _present.setdefault("switches", {})[_SWITCHES[name]] = value
        else:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Switchable


def __getattr__(name: str) -> Any:
    """Returns DeepSpeed's module-level switches with their current values."""
    if name in _SWITCHES:
        option = _SWITCHES[name]
        pending = _present.get("switches", {})
        return pending[option] if option in pending else getattr(_instance().config, option)
    if name == "deepspeed_checkpointing_enabled":
        return is_configured()
    if name == "PROFILE_TIME":  # not supported; torch.profiler shows checkpoints
        return False
    if name == "mpu":  # `configure` keeps only its process group
        return None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_configured() -> bool:
    """Whether `configure` was called."""
    return bool(_present.get("configured"))


def reset() -> None:
    """Resets the statistics; slabs are freed once the backwards that use them have ended."""
    _instance().reset()


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Turns the partitioning among model-parallel ranks on or off."""
    _present.setdefault("switches", {})["partition"] = partition_activation


def set_num_layers(nlayers: int) -> None:
    """Sets the number of checkpoints in one forward, for contiguous storage."""
    _present.setdefault("switches", {})["num_checkpoints"] = nlayers


def get_cuda_rng_tracker() -> RngTracker:
    """Returns the random number streams of model-parallel dropout."""
    return _tracker()


def get_rng_state_tracker() -> RngTracker:
    return _tracker()


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds the default stream equally, and the model-parallel stream differently, on the ranks of a model-parallel
    group.
    """
    from ds_compat.comm import groups

    model_parallel_seed(_tracker(), seed, groups.get_model_parallel_rank())


model_parallel_reconfigure_tp_seed = model_parallel_cuda_manual_seed
