"""Process groups of sequence-parallel ranks, as an `mpu` with Megatron's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ds_compat.comm import groups
from ds_compat.device import get_accelerator


class SequenceMpu:
    """The ranks of a job as data x sequence; consecutive ranks have parts of the same sequences."""

    def __init__(self, sequence_parallel_size: int) -> None:
        """Creates the groups. Collective.

        Raises:
            ValueError: the size does not divide the number of ranks.
        """
        world = dist.get_world_size()
        if sequence_parallel_size < 1 or world % sequence_parallel_size:
            raise ValueError(
                f"{sequence_parallel_size} sequence-parallel ranks do not divide {world} ranks: use a divisor"
            )
        self._mesh: DeviceMesh = init_device_mesh(
            get_accelerator().device_name(),
            (world // sequence_parallel_size, sequence_parallel_size),
            mesh_dim_names=("data", "sequence"),
        )

    def get_sequence_parallel_group(self) -> Any:
        return self._mesh["sequence"].get_group()

    def get_sequence_parallel_world_size(self) -> int:
        return int(self._mesh["sequence"].size())

    def get_sequence_parallel_rank(self) -> int:
        return int(self._mesh["sequence"].get_local_rank())

    def get_data_parallel_group(self) -> Any:
        return self._mesh["data"].get_group()

    def get_data_parallel_world_size(self) -> int:
        return int(self._mesh["data"].size())

    def get_data_parallel_rank(self) -> int:
        return int(self._mesh["data"].get_local_rank())

    def get_sequence_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> Any:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
    """Creates the groups that `deepspeed.utils.groups` returns from now on. Collective."""
    groups.set_mpu(SequenceMpu(sequence_parallel_size))


def with_sequence(config: Mapping[str, Any], mesh_param: Sequence[int] | None) -> dict[str, Any]:
    """Returns a configuration with `mesh_param`, (data-parallel size, sequence-parallel size), entered."""
    if mesh_param is None:
        return dict(config)
    data, sequence = mesh_param
    return {**config, "data_parallel_size": data, "sequence_parallel_size": sequence}


def mpu_of_config(config: Mapping[str, Any]) -> SequenceMpu | None:
    """Returns the groups of `sequence_parallel_size`, which exist already if they were registered with Transformers;
    None without sequence parallelism. Collective.
    """
    size = config.get("sequence_parallel_size")
    if not isinstance(size, int) or size <= 1:
        return None
    known = groups.current()
    if isinstance(known, SequenceMpu) and known.get_sequence_parallel_world_size() == size:
        return known
    return SequenceMpu(size)
