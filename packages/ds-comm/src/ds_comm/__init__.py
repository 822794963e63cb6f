"""Initialises torch.distributed under any launcher, makes device meshes, and provides collectives.

::

    world = ds_comm.start()  # under torchrun, ds run, srun or mpirun, or in a single process
    mesh = ds_comm.data_mesh(world, axes={"data": world.world_size})

Importing this package has no effect, and imports torch only when a name needs it: `detect` does not. Its only state is
the default process group of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_comm.placement import Placement, detect
from ds_comm.variables import PlacementError

if TYPE_CHECKING:
    from ds_comm.collective_set import Collectives, collectives
    from ds_comm.frozen import QuantizedFrozen
    from ds_comm.mesh import data_mesh
    from ds_comm.stop import StopRequest
    from ds_comm.world import StartError, World, start

__all__ = [
    "Collectives",
    "Placement",
    "PlacementError",
    "QuantizedFrozen",
    "StartError",
    "StopRequest",
    "World",
    "collectives",
    "data_mesh",
    "detect",
    "start",
]

_HOMES: Mapping[str, str] = {
    "Collectives": "ds_comm.collective_set",
    "QuantizedFrozen": "ds_comm.frozen",
    "StartError": "ds_comm.world",
    "StopRequest": "ds_comm.stop",
    "World": "ds_comm.world",
    "collectives": "ds_comm.collective_set",
    "data_mesh": "ds_comm.mesh",
    "start": "ds_comm.world",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
