"""Copies between files and GPU memory by NVIDIA's cuFile (GPUDirect Storage), without a buffer in host memory.

[Note: cuFile at run time] The library is opened when a `GpuDirect` is made, never linked: most machines have none. Only
six of its functions are called, all of which have had the same signature since version 1.0. This module has been tested
with a library that stands in for cuFile and moves bytes in host memory; it has not met a GPU yet.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ds_core.io.errors import REMEDIES, IoError, open_error

LIBRARY = "libcufile.so.0"
_OPAQUE_FD = 1  # CU_FILE_HANDLE_TYPE_OPAQUE_FD
_ERROR_BASE = 5000
"""cuFile's own errors are numbered from here on."""


class GpuDirectMissing(RuntimeError):
    """cuFile cannot be used on this machine. The message says why."""


class _Error(ctypes.Structure):
    """CUfileError_t."""

    _fields_ = (("code", ctypes.c_int), ("driver", ctypes.c_int))


class _Handle(ctypes.Union):
    _fields_ = (("fd", ctypes.c_int), ("handle", ctypes.c_void_p))


class _Description(ctypes.Structure):
    """CUfileDescr_t."""

    _fields_ = (("kind", ctypes.c_int), ("handle", _Handle), ("fs_ops", ctypes.c_void_p))


class GpuDirect:
    """cuFile's driver in this process. Operations run in threads, `num_threads` at a time.

    direct = GpuDirect()
    with direct.open(path) as file:
        file.read(tensor, offset=0).result()
    """

    def __init__(
        self, *, library: str = LIBRARY, num_threads: int = 8, device_type: str | None = None
    ) -> None:
        """
        Args:
            library: the name or path of the shared library.
            device_type: of the tensors that are read and written. Default: that of the machine's accelerator.

        Raises:
            GpuDirectMissing: there is no accelerator, the library cannot be opened, or its driver does not start.
        """
        accelerator = torch.accelerator.current_accelerator()
        if device_type is None and accelerator is None:
            raise GpuDirectMissing(
                "cuFile copies between files and GPUs, and torch sees no GPU on this machine"
            )
        self.device_type = device_type or str(accelerator and accelerator.type)
        try:
            self._library = ctypes.CDLL(library, use_errno=True)
            self._declare()
        except (OSError, AttributeError) as error:
            raise GpuDirectMissing(
                f"{library} cannot be used ({error}): install NVIDIA's GPUDirect Storage (package libcufile), or copy "
                "through host memory (ds_core.io.Engine)"
            ) from None
        result = self._library.cuFileDriverOpen()
        if result.code:
            raise GpuDirectMissing(
                f"cuFileDriverOpen: {_described(result)}: check the driver nvidia-fs with NVIDIA's gdscheck, or copy "
                "through host memory (ds_core.io.Engine)"
            )
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="cufile")
        self._closed = False

    def _declare(self) -> None:
        library = self._library
        for name in ("cuFileDriverOpen", "cuFileDriverClose", "cuFileHandleRegister"):
            getattr(library, name).restype = _Error
        library.cuFileHandleRegister.argtypes = (
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(_Description),
        )
        library.cuFileHandleDeregister.restype = None
        library.cuFileHandleDeregister.argtypes = (ctypes.c_void_p,)
        for name in ("cuFileRead", "cuFileWrite"):
            function = getattr(library, name)
            function.restype = ctypes.c_ssize_t
            function.argtypes = (
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_longlong,
                ctypes.c_longlong,
            )

    def open(self, path: str | os.PathLike[str], *, create: bool = False, read_only: bool = False) -> GpuFile:
        """Opens a file, or creates it, with O_DIRECT where the file system has it.

        Raises:
            IoError: it cannot be opened, or cuFile does not support its file system.
        """
        name = os.fspath(path)
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_CREAT if create else 0) | os.O_CLOEXEC
        try:
            try:
                descriptor = os.open(name, flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a file system without O_DIRECT
                    raise
                descriptor = os.open(name, flags, 0o600)
        except OSError as error:
            raise open_error(error, name) from None
        handle = ctypes.c_void_p()
        description = _Description(kind=_OPAQUE_FD, handle=_Handle(fd=descriptor))
        result = self._library.cuFileHandleRegister(ctypes.byref(handle), ctypes.byref(description))
        if result.code:
            os.close(descriptor)
            raise IoError(errno.EOPNOTSUPP, f"cuFileHandleRegister: {_described(result)}", name)
        return GpuFile(self, name, descriptor, handle)

    def close(self) -> None:
        """Waits for all operations and closes the driver. Close files first."""
        if not self._closed:
            self._closed = True
            self._threads.shutdown(wait=True)
            self._library.cuFileDriverClose()


class GpuFile:
    """A file that is open for copies from and to GPU memory; made by `GpuDirect.open`."""

    def __init__(self, direct: GpuDirect, path: str, descriptor: int, handle: ctypes.c_void_p) -> None:
        self._direct, self.path = direct, path
        self._descriptor, self._handle = descriptor, handle
        self._running: set[Future[int]] = set()
        self._lock = threading.Lock()

    def read(self, tensor: Tensor, offset: int = 0) -> Future[int]:
        """Begins to fill the whole of a contiguous GPU tensor with the bytes from `offset` on. The result is the number
        of bytes.

        The present stream of the tensor's device is waited for first, because cuFile knows no streams. Use the tensor
        when the result is there, or after an IoError not at all.
        """
        future = self._start(tensor, offset, is_write=False)
        increment_version(tensor)
        return future

    def write(self, tensor: Tensor, offset: int = 0) -> Future[int]:
        """Begins to write all bytes of a contiguous GPU tensor at `offset`. The tensor must not be changed before the
        result is there.
        """
        return self._start(tensor, offset, is_write=True)

    def _start(self, tensor: Tensor, offset: int, *, is_write: bool) -> Future[int]:
        kind = self._direct.device_type
        if tensor.device.type != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{self.path}: cuFile copies contiguous tensors on {kind}, but this one of shape {tuple(tensor.shape)} "
                f"is on {tensor.device}, with strides {tensor.stride()}"
            )
        if offset < 0:
            raise ValueError(f"offset must not be negative, but is {offset}")
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: the file is closed")
        if tensor.device.type != "cpu":
            torch.accelerator.current_stream(tensor.device).synchronize()
        with self._lock:
            future = self._direct._threads.submit(self._transfer, tensor, offset, is_write)
            self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def _transfer(self, tensor: Tensor, offset: int, is_write: bool) -> int:
        """Calls cuFile until all bytes are transferred; it may transfer fewer at a time."""
        library = self._direct._library
        function = library.cuFileWrite if is_write else library.cuFileRead
        if tensor.device.type != "cpu":
            torch.accelerator.set_device_index(tensor.device.index)
        done = 0
        while done < tensor.nbytes:
            ctypes.set_errno(0)
            count = function(self._handle, tensor.data_ptr(), tensor.nbytes - done, offset + done, done)
            if count > 0:
                done += count
            elif count == -1 and ctypes.get_errno() in (errno.EINTR, errno.EAGAIN):
                continue
            else:
                raise self._failed(tensor.nbytes, offset, done, count, is_write)
        return done

    def _failed(self, num_bytes: int, offset: int, done: int, count: int, is_write: bool) -> IoError:
        doing = "write" if is_write else "read"
        what = f"{doing} of {num_bytes} bytes at offset {offset}, {done} bytes of them done, by cuFile"
        code = ctypes.get_errno() if count == -1 else errno.EIO
        if count == 0:
            code = errno.ENODATA
            size = os.fstat(self._descriptor).st_size
            reason = f"the file has {size} bytes. It was truncated or never written that far"
        elif count == -1:
            reason = f"{os.strerror(code)}. {REMEDIES.get(code, '')}".rstrip()
        else:
            reason = f"error {-count} of cuFile"
        error = IoError(code, f"{what}: {reason}", self.path)
        error.operation, error.offset, error.num_bytes, error.bytes_done = doing, offset, num_bytes, done
        return error

    def close(self) -> None:
        """Waits for the file's operations and closes it."""
        if self._descriptor < 0:
            return
        with self._lock:
            running = list(self._running)
        for future in running:
            future.exception()
        self._direct._library.cuFileHandleDeregister(self._handle)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> GpuFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _described(error: _Error) -> str:
    more = f", error {error.driver} of the GPU's driver" if error.driver else ""
    return f"error {error.code} of cuFile{more}"
