"""Start-up of ranks from any launcher, and device meshes over them.

    world = ds_comm.start()                              # torchrun, ds run, srun, mpirun, or one plain
    process mesh = ds_comm.data_mesh(world, axes={"data": world.world_size})

Importing this package starts nothing; there is no state beside the process group that torch.distributed
keeps.
"""

from ds_comm.mesh import data_mesh
from ds_comm.placement import Placement, PlacementError, detect
from ds_comm.world import StartError, World, start

__all__ = ["Placement", "PlacementError", "StartError", "World", "data_mesh", "detect", "start"]
