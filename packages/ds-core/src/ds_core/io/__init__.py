"""Asynchronous reads and writes of files into and from tensors: io_uring or threads, with O_DIRECT where it works.

with Engine() as engine, engine.open(path, create=True, num_bytes=x.nbytes) as file:
    file.write(x).wait()
    file.read(y).wait()
"""

from ds_core.io.engine import Engine, Work
from ds_core.io.errors import IoError, IoTimeoutError
from ds_core.io.file import File
from ds_core.io.gpu_direct import GpuDirect, GpuDirectMissing, GpuFile

__all__ = ["Engine", "File", "GpuDirect", "GpuDirectMissing", "GpuFile", "IoError", "IoTimeoutError", "Work"]
