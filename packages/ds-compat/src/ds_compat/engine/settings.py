"""Small parts of the engine: answers from the configuration, loaders, gradients of plain backwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import ds_engine
from ds_engine.build.data import Loader

if TYPE_CHECKING:
    from ds_compat.engine.engine import DeepSpeedEngine

_ABSENT = object()


def answer(path: str, default: Any) -> Callable[[Any], Any]:
    """A method that reads one setting: as resolved by ds_engine, else as given, else `default`."""

    def getter(self: Any) -> Any:
        return find(self._engine.config, self.config, path, default)

    getter.__name__ = path.rpartition(".")[2]
    getter.__doc__ = f"The setting {path}."
    return getter


def of_config(name: str) -> Callable[[Any], Any]:
    """A method that reads one attribute of the engine's `DeepSpeedConfig`."""
    return lambda self: getattr(self._config, name)


class ZeroAnswers:
    """`zero_<name>()` for each setting of the section zero_optimization that the original has such a method for."""


def _zero_answer(name: str) -> Callable[[Any], Any]:
    def getter(self: Any) -> Any:
        section = self._config.zero_config
        return getattr(section, name if hasattr(section, name) else f"zero_{name}")

    getter.__name__ = f"zero_{name}"
    return getter


_ZERO = (
    "reduce_scatter overlap_comm sub_group_size reduce_bucket_size allgather_bucket_size allgather_partitions "
    "contiguous_gradients load_from_fp32_weights elastic_checkpoint max_live_parameters max_reuse_distance "
    "prefetch_bucket_size module_granularity_threshold param_persistence_threshold model_persistence_threshold "
    "gather_16bit_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients "
    "hpz_partition_size quantized_weights quantized_gradients offload_optimizer offload_param"
)
for _name in _ZERO.split():
    setattr(ZeroAnswers, f"zero_{_name}", _zero_answer(_name))


def find(config: Any, raw: Any, path: str, default: Any) -> Any:
    """The value at a dotted path of the typed configuration, else of the dict, else `default`."""
    for root, step in ((config, lambda at, key: getattr(at, key, _ABSENT)), (raw, _item)):
        try:
            value = functools.reduce(step, path.split("."), root)
        except (AttributeError, TypeError):
            continue
        if value is not _ABSENT and value is not None:
            return value
    return default


def _item(at: Any, key: str) -> Any:
    return at.get(key, _ABSENT) if isinstance(at, dict) else _ABSENT


def write(engine: ds_engine.Engine, name: str, value: Any) -> None:
    """An attribute of the inner engine; the micro-batch counter has its own home."""
    if name == "micro_steps":
        engine.accumulation.micro_steps = value
    else:
        setattr(engine, name, value)


def loader(
    engine: DeepSpeedEngine,
    dataset: Dataset[Any],
    batch_size: int | None,
    route: str,
    sampler: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> Any:
    """See `DeepSpeedEngine.deepspeed_io`."""
    if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        raise ValueError("Training data must be a torch Dataset")
    micro = batch_size or engine.train_micro_batch_size_per_gpu()
    pin = engine.device.type != "cpu"
    if sampler is not None or route != "train":
        if sampler is None:
            sampler = DistributedSampler(dataset, engine.world_size, engine.global_rank, shuffle=False)
        return DataLoader(
            dataset, micro, sampler=sampler, collate_fn=collate_fn, pin_memory=pin,
            drop_last=engine.dataloader_drop_last(),
        )  # fmt: skip
    return Loader(
        dataset,
        micro_batch=micro,
        rank=engine.global_rank,
        ranks=engine.world_size,
        seed=engine._engine.config.seed or 0,
        collate_fn=collate_fn,
        pin_memory=pin,
    )


class _Silent:
    """A monitor that is switched off."""

    enabled = False

    def write_events(self, event_list: Any) -> None:
        """Nothing."""


def monitor(engine: DeepSpeedEngine) -> Any:
    """The engine's monitor, or one that is switched off."""
    return getattr(engine._engine, "monitor", None) or _Silent()


def half_of(engine: ds_engine.Engine) -> torch.dtype | None:
    """The 16-bit dtype in which the model computes, if it is one."""
    return engine.precision.param_dtype
