"""Local stand-in; replaced by the native engine."""
import ctypes, os, threading
from concurrent.futures import ThreadPoolExecutor
import torch
class Work:
    def __init__(self, f, keep): self.f, self.keep = f, keep
    def wait(self, timeout_s=None): self.f.result()
    def done(self): return self.f.done()
class File:
    def __init__(self, e, path, num_bytes, create):
        self.path, self.e = path, e
        self.fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        if create: os.posix_fallocate(self.fd, 0, num_bytes)
        self.num_bytes = num_bytes; self.direct=False
    def _mv(self, t): return memoryview((ctypes.c_uint8*t.nbytes).from_address(t.data_ptr())).cast('B')
    def read(self, t, offset=0):
        mv=self._mv(t)
        def run():
            n=os.preadv(self.fd,[mv],offset)
            if n!=len(mv): raise OSError(5, f"short read of {self.path}")
        return Work(self.e.pool.submit(run), t)
    def write(self, t, offset=0):
        mv=self._mv(t)
        return Work(self.e.pool.submit(lambda: os.pwritev(self.fd,[mv],offset)), t)
    def close(self, *, unlink=False): os.close(self.fd)
class Engine:
    def __init__(self, *, backend="auto", block_bytes=1<<20, queue_depth=32, num_threads=0, direct=True):
        self.pool=ThreadPoolExecutor(4); self.backend="threads"
    def open(self, path, *, num_bytes=None, create=False, read_only=False): return File(self, path, num_bytes, create)
    def close(self): self.pool.shutdown()
