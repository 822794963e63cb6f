"""`deepspeed.utils.groups`: process groups by purpose. Without tensor, sequence and expert parallelism every rank is
a data-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

_mpu: list[Any] = []
"""The mpu of the latest engine, because DeepSpeed's accessors have no engine as an argument."""


def set_mpu(mpu: Any) -> None:
    """Stores the mpu of the latest engine."""
    _mpu[:] = [mpu] if mpu is not None else []


def current() -> Any:
    """Returns the mpu of the latest engine, or None."""
    return _mpu[0] if _mpu else None


def _ask(*names: str, default: Any) -> Any:
    for mpu in _mpu:
        for name in names:
            method = getattr(mpu, name, None)
            if callable(method):
                return method()
    return default


def _world() -> Any:
    return dist.group.WORLD


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _get_data_parallel_group() -> Any:
    return _ask("get_data_parallel_group", default=_world())


def _get_data_parallel_world_size() -> int:
    return int(_ask("get_data_parallel_world_size", default=_size()))


def _get_data_parallel_rank() -> int:
    return int(_ask("get_data_parallel_rank", default=_rank()))


def _get_data_parallel_group_ranks() -> list[int]:
    return list(dist.get_process_group_ranks(_get_data_parallel_group()))


def _get_model_parallel_world_size() -> int:
    return int(_ask("get_model_parallel_world_size", "get_tensor_model_parallel_world_size", default=1))


def get_model_parallel_rank() -> int:
    return int(_ask("get_model_parallel_rank", "get_tensor_model_parallel_rank", default=0))


def get_model_parallel_group() -> Any:
    return _ask("get_model_parallel_group", "get_tensor_model_parallel_group", default=None)


def _get_sequence_parallel_world_size() -> int:
    return int(_ask("get_sequence_parallel_world_size", default=1))


def _get_sequence_parallel_rank() -> int:
    return int(_ask("get_sequence_parallel_rank", default=0))


def _get_sequence_parallel_group() -> Any:
    return _ask("get_sequence_parallel_group", default=None)


def _get_sequence_data_parallel_world_size() -> int:
    return int(_ask("get_sequence_data_parallel_world_size", default=_get_data_parallel_world_size()))


def _get_sequence_data_parallel_rank() -> int:
    return int(_ask("get_sequence_data_parallel_rank", default=_get_data_parallel_rank()))


def _get_sequence_data_parallel_group() -> Any:
    return _ask("get_sequence_data_parallel_group", default=_get_data_parallel_group())


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_world_size = get_tensor_model_parallel_world_size = _get_model_parallel_world_size
get_tensor_model_parallel_rank = get_model_parallel_rank
get_tensor_model_parallel_group = get_model_parallel_group


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Accepts only expert groups of one rank."""
    if ep_size != 1:
        from ds_compat import refused

        raise refused.NotThereError("groups.initialize(ep_size > 1): expert parallelism belongs to ds-moe")
    set_mpu(mpu)


def _get_max_expert_size_name() -> str:
    return "ep_size_1"


def _get_expert_parallel_world_size(group_name: str) -> int:
    return 1


def _get_expert_model_parallel_world_size() -> int:
    return 1
