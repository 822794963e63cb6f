"""`deepspeed.ops.aio`: `aio_handle` over the I/O engine of ds_core.

What differs from DeepSpeed's: a failure raises `ds_core.io.IoError` instead of a return of -1; sizes need not be
multiples of anything; `wait` without pending operations returns 0; nothing is printed.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_core import arena
from ds_core.io import Engine, File, Work

_LOCKED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Tensors of `new_cpu_locked_tensor`, of all handles, by the address of their storage."""
_ALIGNMENT = 512


class pin_handle:
    """Allocates tensors for I/O: page-locked where there is an accelerator, otherwise on huge pages."""

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """Returns a tensor of `num_elem` elements with the dtype of `example_tensor`."""
        dtype = example_tensor.dtype
        if torch.accelerator.is_available():
            tensor = torch.empty(num_elem, dtype=dtype, pin_memory=True)
        else:
            tensor = arena.empty(num_elem, dtype)
        _LOCKED[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Returns whether the tensor was from `new_cpu_locked_tensor`. Its memory is freed with its last view."""
        return _LOCKED.pop(tensor.untyped_storage().data_ptr(), None) is not None

    def is_pinned(self, buffer: Tensor) -> bool:
        """Whether the buffer lies in memory of `new_cpu_locked_tensor`, of any handle, or in pinned memory."""
        known = buffer.device.type == "cpu" and buffer.untyped_storage().data_ptr() in _LOCKED
        return known or (torch.accelerator.is_available() and buffer.is_pinned())


@dataclass(frozen=True)
class _Pending:
    """An operation that was begun: `staged` holds the bytes in host memory where `buffer` is elsewhere."""

    work: Work
    file: File
    buffer: Tensor
    staged: Tensor
    is_read: bool
    offset: int
    validate: bool

    def finish(self) -> None:
        try:
            self.work.wait()
            if self.is_read and self.staged is not self.buffer:
                self.buffer.copy_(self.staged)
            if self.validate:
                self._compare()
        finally:
            self.file.close()

    def _compare(self) -> None:
        size = self.staged.nbytes
        with open(self.file.path, "rb") as plain:
            plain.seek(self.offset)
            expected = plain.read(size)
        actual = self.staged.reshape(-1).view(torch.uint8).numpy().tobytes()
        if expected != actual:
            raise RuntimeError(
                f"validate: {size} bytes at offset {self.offset} of {self.file.path} differ from the tensor's"
            )


class aio_handle(pin_handle):
    """Reads and writes whole tensors, from and to files, in the background.

    Args:
        block_size: size of a request in bytes.
        queue_depth: number of requests in flight.
        single_submit: without effect: requests are submitted as they fit.
        overlap_events: without effect: new requests are submitted while others complete.
        intra_op_parallelism: number of threads that share one operation.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._block_size = block_size
        self._queue_depth = queue_depth
        self._single_submit = single_submit
        self._overlap_events = overlap_events
        self._intra_op_parallelism = intra_op_parallelism
        # The peer's threads have a queue each.
        self._engine = Engine(
            block_bytes=block_size,
            queue_depth=queue_depth * intra_op_parallelism,
            num_threads=intra_op_parallelism,
        )
        self._lock = threading.Lock()
        self._pending: list[_Pending] = []

    def get_block_size(self) -> int:
        return self._block_size

    def get_queue_depth(self) -> int:
        return self._queue_depth

    def get_single_submit(self) -> bool:
        return self._single_submit

    def get_overlap_events(self) -> bool:
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        return self._intra_op_parallelism

    def get_alignment(self) -> int:
        """Sizes that are multiples of this were needed by DeepSpeed's handle; here any size will do."""
        return self._intra_op_parallelism * _ALIGNMENT

    def read(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Fills the buffer from the file, and returns 0."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Writes the buffer to the file, and returns 0."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0

    def pread(
        self, buffer: Tensor, filename: str, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int:
        """Begins to fill the buffer from the file, and returns 0; not `async_op`: returns what `wait` does."""
        return self._run(True, buffer, filename, validate, async_op, file_offset)

    def pwrite(
        self, buffer: Tensor, filename: str, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int:
        """Begins to write the buffer to the file, and returns 0; not `async_op`: returns what `wait` does."""
        return self._run(False, buffer, filename, validate, async_op, file_offset)

    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(
        self,
        buffer: Tensor,
        filename: str | int | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Begins to write to a file that is given by its name, or by an open descriptor (second argument or `fd`)."""
        target = filename if fd is None else fd
        if target is None:
            raise TypeError("async_pwrite needs filename or fd")
        if isinstance(target, int):
            target = f"/proc/self/fd/{target}"
        return self.pwrite(buffer, target, False, True, file_offset)

    def wait(self) -> int:
        """Waits for all operations that were begun, and returns their number."""
        with self._lock:
            return self._finish_all()

    def _run(
        self, is_read: bool, buffer: Tensor, filename: str, validate: bool, async_op: bool, offset: int
    ) -> int:
        name = os.fspath(filename)
        with self._lock:
            staged = buffer if buffer.device.type == "cpu" else torch.empty_like(buffer, device="cpu")
            if not is_read and staged is not buffer:
                staged.copy_(buffer)
            file = self._engine.open(
                name,
                read_only=is_read,
                create=not is_read and not os.path.exists(name),
                num_bytes=offset + buffer.nbytes if is_read else None,
            )
            begin = file.read if is_read else file.write
            work = begin(staged, offset)
            self._pending.append(_Pending(work, file, buffer, staged, is_read, offset, validate))
            return 0 if async_op else self._finish_all()

    def _finish_all(self) -> int:
        pending, self._pending = self._pending, []
        errors: list[BaseException] = []
        for one in pending:
            try:
                one.finish()
            except (OSError, RuntimeError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return len(pending)


def aio_read(
    buffer: Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fills the buffer from the file, and returns 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Writes the buffer to the file, and returns 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(
        buffer, filename, validate
    )


def deepspeed_memcpy(dest: Any, src: Any) -> int:
    """Copies a tensor, and returns 0."""
    dest.copy_(src)
    return 0
