"""ds-layers for an engine: layers that are cut among tensor-parallel ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.optim import Optimizer

import ds_zero
from ds_engine.config import ConfigError, DsConfig
from ds_engine.config.sections.parallel.tensor_parallel import TensorParallelConfig


def ranks_of(settings: DsConfig, model: nn.Module) -> int:
    """Returns the number of ranks that share a layer, as configured, or as the model is cut already.

    Raises:
        ConfigError: the model is cut for another number of ranks than configured.
    """
    configured, size = settings.tensor_parallel.ranks, ranks_of_dtensors(model)
    if size is None:
        return configured
    if configured not in (1, size):
        raise ConfigError(
            [
                f"tensor_parallel: the configuration has {configured} ranks, and the model is cut already, for {size}: "
                "remove the section, or load the model without tensor parallelism"
            ]
        )
    return size


def ranks_of_dtensors(model: nn.Module) -> int | None:
    """Returns among how many ranks the DTensor parameters of a model are divided; None: it has none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None:  # not imported: there are none, and importing it takes long
        return None
    parts: list[Any] = [p for p in model.parameters() if isinstance(p, tensors.DTensor)]
    return int(parts[0].device_mesh.size()) if parts else None


def cut(model: nn.Module, settings: DsConfig, group: ProcessGroup | None, optimizer: Any) -> None:
    """Cuts the layers of a model among the ranks of a group, in place, or takes the parts of a model that is cut
    already. Collective. Without a group, layers stay whole.

    Raises:
        ConfigError: sizes that the ranks do not divide, or a model without a plan.
    """
    if group is None:
        return
    from ds_layers import tensor

    section = settings.tensor_parallel
    try:
        mesh = tensor.localize(model, optimizer if isinstance(optimizer, Optimizer) else None)
        if mesh is not None:
            here, there = get_process_group_ranks(group), get_process_group_ranks(mesh.get_group())
            if here != there:
                raise ValueError(
                    f"the model is cut among ranks {there}, and consecutive ranks {here} must share a layer"
                )
            return
        tensor.parallelize(
            model,
            group,
            plan=plan_of_section(section, model),
            sequence_parallel=section.sequence_parallel_norms,
        )
    except ValueError as error:
        raise ConfigError([f"tensor_parallel: {error}"]) from None


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model finds its attention in the registry of Transformers."""
    return hasattr(model, "config") and hasattr(model, "set_attn_implementation")


def divide_sequences(model: nn.Module, group: ProcessGroup) -> bool:
    """Divides the attention of a model of Transformers among sequence-parallel ranks; False for any other model."""
    if not is_of_transformers(model):
        return False
    from ds_layers import SequenceParallelAttention, register_with_transformers

    register_with_transformers(SequenceParallelAttention(group), model=model)
    return True


def plan_of_section(section: TensorParallelConfig, model: nn.Module) -> dict[str, str]:
    """Returns which layers of a model are cut, and how, as configured.

    Raises:
        ValueError: mistakes in `layer_specs`, or a model of an unknown family without them.
    """
    from ds_layers import tensor

    own, vocabulary = section.partition_config, bool(section.vocab_parallel_lm_head)
    if own is None:
        return tensor.infer_plan(model, vocabulary=vocabulary)
    plan = tensor.plan_of_specs(own.layer_specs)
    return plan | tensor.infer_plan(model) if own.use_default_specs else plan


def model_parallel(group: ProcessGroup) -> ds_zero.ModelParallel:
    """Returns the tensor-parallel axis for `ds_zero.shard`."""
    from ds_layers.tensor import cut_of

    is_cut: Callable[[str, nn.Parameter], bool] = lambda fqn, param: cut_of(fqn, param) is not None  # noqa: E731
    return ds_zero.ModelParallel(group=group, is_cut=is_cut, part_of=cut_of)
