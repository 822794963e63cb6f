"""Files of an I/O engine."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import increment_version

from ds_core.io.errors import Facts, failed, open_error

if TYPE_CHECKING:
    from ds_core._core import IoFile
    from ds_core.io.engine import Engine, Work


class File:
    """A file that is open for asynchronous reads and writes; made by `Engine.open`.

    Operations on disjoint ranges may be in flight at the same time. Those on ranges that overlap have no order unless
    the first is waited for.
    """

    def __init__(self, engine: Engine, native: IoFile, path: str) -> None:
        self._engine = engine
        self._native = native
        self.path = path

    @property
    def num_bytes(self) -> int:
        """The present size of the file."""
        try:
            return self._native.num_bytes
        except OSError as error:
            raise open_error(error, self.path) from None

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use; `reason` says why it is not."""
        return self._native.direct

    @property
    def reason(self) -> str:
        """Why O_DIRECT is not in use; empty if it is."""
        return self._native.reason

    @property
    def offset_alignment(self) -> int:
        """Parts of operations between multiples of this, in bytes, go without the page cache; 1 without O_DIRECT."""
        return self._native.offset_alignment

    @property
    def memory_alignment(self) -> int:
        """Tensors whose address is a multiple of this, in bytes, are not copied, if their offset is aligned, too."""
        return self._native.memory_alignment

    def read(self, tensor: Tensor, offset: int = 0) -> Work:
        """Begins to fill the whole of a contiguous CPU tensor of any dtype with the bytes from `offset` on."""
        work = self._engine._submit(self._native, tensor, offset, is_write=False)
        increment_version(tensor)
        return work

    def write(self, tensor: Tensor, offset: int = 0) -> Work:
        """Begins to write all bytes of a contiguous CPU tensor of any dtype at `offset`; extends the file if needed.

        The tensor must not be changed before the write is done.
        """
        return self._engine._submit(self._native, tensor, offset, is_write=True)

    def close(self, *, unlink: bool = False) -> None:
        """Waits for the file's operations, closes it, and removes it with `unlink`.

        Raises IoError if an operation failed for which nobody has waited.
        """
        if self._native.closed:
            return
        try:
            if self._engine._is_usable():
                self._engine._wait_for_file(self._native)
                for fact in self._engine._native.unseen_failures(self._native):
                    raise failed(Facts(*fact))
        finally:
            self._native.close()
            if unlink and os.path.exists(self.path):
                os.unlink(self.path)

    def __enter__(self) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._native.closed else "direct" if self.direct else f"buffered: {self.reason}"
        return f"File({self.path!r}, {state})"
