"""The section `zero_optimization`, and what the top level says of gradients, in ds_zero's words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

import ds_comm
import ds_zero
from ds_core.kernels import squared_norm
from ds_engine.build.precision import DTYPES
from ds_engine.config import Batch, ConfigError, DsConfig
from ds_engine.config.sections.zero.leaf_module import DEFAULT_CLASSES, LeafModuleConfig


def options(
    settings: DsConfig,
    batch: Batch,
    dtypes: Mapping[str, Any],
    model: nn.Module,
    world: ds_comm.World | None = None,
) -> dict[str, Any]:
    """Arguments of `ds_zero.shard`, beside the model, the optimizer and the stage.

    Args:
        dtypes: fields of `ZeroConfig` that `Precision.zero_options` gives.
        model: for `leaf_module`, whose entries are looked up in it.
        world: for `mics_shard_size`, whose groups every rank makes alike.

    Raises:
        ConfigError: `mics_shard_size` does not divide the ranks.
    """
    zero = settings.zero_optimization
    found: dict[str, Any] = {
        "norms": squared_norm,
        "config": zero_config(settings, batch, dtypes, model),
    }
    if zero.offload_optimizer.device == "cpu":
        import ds_offload

        found["store"] = ds_offload.HostStore()
    if zero.mics_shard_size > 0:
        found["mesh"] = _groups(zero.mics_shard_size, batch.ranks, world)
    return found


def zero_config(
    settings: DsConfig, batch: Batch, dtypes: Mapping[str, Any], model: nn.Module
) -> ds_zero.ZeroConfig:
    """The policy of `ds_zero.shard`; arguments as for `options`."""
    zero = settings.zero_optimization
    return ds_zero.ZeroConfig(
        accumulation=zero.accumulation_plan,
        rank_invariant=zero.rank_invariant,
        secondary_ranks=max(1, zero.zero_hpz_partition_size),
        # Where the caller decides, no backward is known to be the last one: sums wait for step().
        accumulation_steps=batch.steps if settings.managed_gradient_accumulation else sys.maxsize,
        sparse_gradients=settings.sparse_gradients,
        **dtypes,
        **_reduction(settings, batch.ranks),
        publish_bucket_numel=zero.allgather_bucket_size,
        persistence_threshold_numel=zero.stage3_param_persistence_threshold,
        model_persistence_numel=zero.stage3_model_persistence_threshold,
        prefetch=zero.stage3_prefetch,
        prefetch_numel=zero.stage3_prefetch_bucket_size,
        max_live_numel=zero.stage3_max_live_parameters,
        max_reuse_distance_numel=zero.stage3_max_reuse_distance,
        module_granularity_numel=zero.stage3_module_granularity_threshold or 0,
        leaf_modules=leaf_modules(zero.leaf_module, model) if zero.stage == 3 else (),
        overlap_publish=zero.overlap_publish and zero.stage in (1, 2),
    )


def leaf_modules(section: LeafModuleConfig, model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that stage 3 gathers whole.

    Raises:
        ConfigError: a name, a suffix or a class that no module has, except for the classes of the default, which most
            models lack.
    """
    modules = dict(model.named_modules())
    found: set[str] = set()
    missing: list[str] = []

    def take(key: str, wanted: Iterable[str], fits: Callable[[str, str], bool]) -> None:
        for text in wanted:
            names = {name for name in modules if fits(text, name)}
            if not names and not (key == "classes" and text in DEFAULT_CLASSES):
                missing.append(f"zero_optimization.leaf_module.{key}: the model has no {text!r}")
            found.update(names)

    take("classes", section.classes, lambda text, name: text in _class_names(type(modules[name])))
    take("names", section.names, lambda text, name: text == name)
    take("name_suffixes", section.name_suffixes, lambda text, name: name.endswith(text))
    if missing:
        raise ConfigError(missing)
    return tuple(sorted(found))


def _class_names(kind: type) -> tuple[str, str]:
    return kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"


def _reduction(settings: DsConfig, ranks: int) -> dict[str, Any]:
    """How gradients are reduced."""
    zero, wire = settings.zero_optimization, settings.communication_data_type
    return {
        "reduce_bucket_numel": zero.reduce_bucket_size,
        "overlap_reduce": zero.overlap_comm,
        "reduce_scatter": zero.reduce_scatter,
        "ignore_unused": zero.ignore_unused_parameters,
        "communication_dtype": DTYPES[wire] if wire is not None else None,
        "reduce_op": settings.gradient_allreduce_op,
        # To divide before the sum is to predivide by all ranks.
        "predivide_factor": float(ranks)
        if settings.prescale_gradients
        else settings.gradient_predivide_factor,
    }


def _groups(size: int, ranks: int, world: ds_comm.World | None) -> Any:
    """Neighbouring ranks in groups of `size` that divide the model; the groups hold the same. None: one group."""
    if ranks % size:
        raise ConfigError(
            [
                f"zero_optimization.mics_shard_size {size} does not divide {ranks} ranks into groups: set it to a "
                "divisor, or to -1 for one group"
            ]
        )
    if size == ranks or world is None:
        return None
    return ds_comm.data_mesh(world, {"replicate": ranks // size, "shard": size})
