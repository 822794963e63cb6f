"""The files of an `NVMeStore`."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path

from ds_core import io

ALIGNMENT = 4096
"""Tensors begin at multiples of this many bytes, as O_DIRECT requires."""


def aligned(num_bytes: int) -> int:
    """Rounds up to a multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class SwapFile:
    """A file without a name, in a folder of the user.

    [Note: files without a name]
    The name is removed as soon as the file is open. So the system frees the space when the process ends, also if it is
    killed, no later run has to clean up, and no other process opens the file by accident. The space shows in `df`, but
    not in `du`.
    """

    def __init__(self, engine: io.Engine, folder: Path, num_bytes: int) -> None:
        """
        Raises:
            OSError: the folder cannot be used, or its disk has no room. The message names both and what is needed.
        """
        _check_room(folder, num_bytes)
        number, name = tempfile.mkstemp(
            prefix=f"ds-{socket.gethostname()}-{os.getpid()}-", suffix=".swap", dir=folder
        )
        os.close(number)
        os.unlink(name)  # only the unused name was needed
        self.num_bytes = num_bytes
        self.num_extents = 0
        """Number of tensors in the file. It is closed when the last one is released."""
        try:
            self._file = engine.open(name, num_bytes=num_bytes, create=True, exclusive=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _no_room(folder, num_bytes) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    @property
    def file(self) -> io.File:
        """The open file."""
        return self._file

    def close(self) -> None:
        """Frees the space. No operation may be in progress."""
        self._file.close()


def _check_room(folder: Path, num_bytes: int) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR,
            "the folder for offloaded state does not exist: create it, or name another",
            str(folder),
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, "cannot create files in the folder for offloaded state", str(folder)
        )
    if shutil.disk_usage(folder).free < num_bytes:
        raise _no_room(folder, num_bytes)


def _no_room(folder: Path, num_bytes: int) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"offloaded state needs {num_bytes / 2**30:.3f} GiB for this rank, and {free / 2**30:.3f} GiB are free: free "
        "space, name a folder on another disk, or keep fewer kinds of state on the disk",
        str(folder),
    )
