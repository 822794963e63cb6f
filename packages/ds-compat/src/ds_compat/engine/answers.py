"""Methods of the engine that return settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_compat.config.lookup import find


def answer(path: str, default: Any) -> Callable[[Any], Any]:
    """Makes a method that returns one setting: as resolved by ds_engine, else as written, else `default`."""

    def getter(self: Any) -> Any:
        return find(self._engine.config, self.config, path, default)

    getter.__name__ = path.rpartition(".")[2]
    getter.__doc__ = f"The setting {path}."
    return getter


def of_config(name: str) -> Callable[[Any], Any]:
    """Makes a method that returns an attribute of the engine's `DeepSpeedConfig`."""
    return lambda self: getattr(self._config, name)


def of_zero(name: str) -> Callable[[Any], Any]:
    """Makes a method that returns a setting of the section zero_optimization."""

    def getter(self: Any) -> Any:
        return getattr(self._config.zero_config, name)

    getter.__name__ = name if name.startswith("zero_") else f"zero_{name}"
    return getter


class ZeroAnswers:
    """One method for each setting of zero_optimization for which DeepSpeed's engine has a method."""

    zero_reduce_scatter = of_zero("reduce_scatter")
    zero_overlap_comm = of_zero("overlap_comm")
    zero_sub_group_size = of_zero("sub_group_size")
    zero_reduce_bucket_size = of_zero("reduce_bucket_size")
    zero_allgather_bucket_size = of_zero("allgather_bucket_size")
    zero_allgather_partitions = of_zero("allgather_partitions")
    zero_contiguous_gradients = of_zero("contiguous_gradients")
    zero_load_from_fp32_weights = of_zero("load_from_fp32_weights")
    zero_elastic_checkpoint = of_zero("elastic_checkpoint")
    zero_max_live_parameters = of_zero("max_live_parameters")
    zero_max_reuse_distance = of_zero("max_reuse_distance")
    zero_prefetch_bucket_size = of_zero("prefetch_bucket_size")
    zero_module_granularity_threshold = of_zero("module_granularity_threshold")
    zero_param_persistence_threshold = of_zero("param_persistence_threshold")
    zero_model_persistence_threshold = of_zero("model_persistence_threshold")
    zero_gather_16bit_weights_on_model_save = of_zero("gather_16bit_weights_on_model_save")
    zero_ignore_unused_parameters = of_zero("ignore_unused_parameters")
    zero_legacy_stage1 = of_zero("legacy_stage1")
    zero_round_robin_gradients = of_zero("round_robin_gradients")
    zero_hpz_partition_size = of_zero("zero_hpz_partition_size")
    zero_quantized_weights = of_zero("zero_quantized_weights")
    zero_quantized_gradients = of_zero("zero_quantized_gradients")
    zero_offload_optimizer = of_zero("offload_optimizer")
    zero_offload_param = of_zero("offload_param")
