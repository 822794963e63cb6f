"""Initialises torch.distributed under any launcher, and makes device meshes.

::

    world = ds_comm.start()  # under torchrun, ds run, srun or mpirun, or in a single process
    mesh = ds_comm.data_mesh(world, axes={"data": world.world_size})

Importing this package has no effect. Its only state is the default process group of torch.distributed.
"""

from ds_comm.mesh import data_mesh
from ds_comm.placement import Placement, detect
from ds_comm.stop import StopRequest
from ds_comm.variables import PlacementError
from ds_comm.world import StartError, World, start

__all__ = [
    "Placement",
    "PlacementError",
    "StartError",
    "StopRequest",
    "World",
    "data_mesh",
    "detect",
    "start",
]
