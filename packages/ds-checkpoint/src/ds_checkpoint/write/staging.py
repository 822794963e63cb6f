"""Commits a checkpoint atomically, and removes checkpoints.

[Note: commit] A checkpoint is written into `<tag>.tmp-<nonce>/`. Every file is synced, the manifest last, and then
the folder. The new contents of `latest` are written in advance, too, so the following steps need no disk space:

    1. an older checkpoint of the same name is renamed to `<tag>.old-<nonce>`,
    2. the new one is renamed to `<tag>`, and the directory is synced: from now on it is valid,
    3. `latest` is replaced by rename,
    4. the older one is renamed to a `.tmp-` name and removed.

A process may die between any two of these steps. A `.tmp-` folder is never valid, and the next save removes it. An
`.old-` folder is valid under its tag only if `<tag>` is missing (death between 1 and 2). Nothing is deleted under a
valid name, and nothing but checkpoints is renamed or deleted.

The writer holds a lock on its folder, which the system releases when the process dies. So a save removes the remains
of dead saves, and never a folder that another process is writing. Several jobs may save into one directory: every
operation that changes names in it (cleaning up, creating and locking the folder, the steps above, pruning) holds a
lock on the directory.

A tag may be a symbolic link of the user (`ln -s global_step100 best`). Saving under that tag replaces the link. Its
target is not changed, and it is not pruned while the link exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ds_checkpoint.disk import synced
from ds_checkpoint.format import folder
from ds_checkpoint.format.folder import LATEST, LEFT, OLD, TEMPORARY

UNLOCKABLE_AGE_S = 900.0
"""On a file system without locks, a temporary folder that was not modified for this time is treated as dead."""


class Staging:
    """The folder that a save writes into, on the rank that commits it."""

    def __init__(self, root: Path, tag: str, *, name_latest: bool = True) -> None:
        """Removes the remains of dead saves, and creates the folder.

        Args:
            name_latest: whether `latest` will name this checkpoint.

        Raises:
            OSError: the folder cannot be created, or `<root>/<tag>` exists and is not a checkpoint.
        """
        made = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for path in made:
            synced.sync(path.parent)
        self.root = root
        self.tag = tag
        self.nonce = secrets.token_hex(4)
        self.path = root / f"{tag}{TEMPORARY}{self.nonce}"
        self.names_latest = name_latest
        self._pointer = root / f"{LATEST}{TEMPORARY}{self.nonce}" if name_latest else None
        with _alone_in(root):
            _recover(root)
            if os.path.lexists(root / tag) and not folder.is_complete(root / tag):
                raise FileExistsError(
                    f"{root / tag} exists and is not a checkpoint of ds-checkpoint: choose another tag"
                )
            latest = root / LATEST
            if name_latest and latest.is_dir() and not latest.is_symlink():
                raise FileExistsError(
                    f"{latest} is a folder, but a file of this name must contain the name of the latest "
                    "checkpoint: rename the folder"
                )
            self.path.mkdir()
            self._lock = _lock(self.path)

    def commit(self) -> Path:
        """Commits the checkpoint, see [Note: commit], and returns its final path."""
        synced.sync(self.path)
        if self._pointer is not None:
            synced.write_synced(self._pointer, self.tag.encode())
        final = self.root / self.tag
        old = self.root / f"{self.tag}{OLD}{self.nonce}"
        with _alone_in(self.root):
            replaces = os.path.lexists(final)
            if replaces:
                final.rename(old)
            try:
                self.path.rename(final)
            except OSError:
                if replaces:
                    old.rename(final)
                raise
            synced.sync(self.root)
            if self._pointer is not None:
                self._pointer.rename(self.root / LATEST)
                synced.sync(self.root)
            if replaces:
                remove(old)
        self._unlock()
        return final

    def abort(self) -> None:
        """Removes the temporary folder. Safe after a failed commit, too."""
        self._unlock()
        if self._pointer is not None:
            self._pointer.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove(path: Path) -> None:
    """Deletes a checkpoint: first it is renamed to an invalid name, then its files are deleted. Of a link, only the
    link is deleted. It is not an error if another process has removed it or is removing it.
    """
    left = LEFT.fullmatch(path.name)
    doomed = path.with_name(f"{left['tag'] if left else path.name}{TEMPORARY}{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        _discard(doomed)


def _discard(path: Path) -> None:
    """Deletes a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def prune(root: Path, keep_last: int, keep: str) -> None:
    """Removes all but the newest `keep_last` checkpoints. `keep`, links and their targets are never removed."""
    with _alone_in(root):
        there = folder.complete(root)
        links = {tag for tag, path in there.items() if path.is_symlink()}
        kept = {keep, *links, *(os.path.basename(os.path.realpath(there[tag])) for tag in links)}
        ages = [tag for tag in folder.by_age(root) if tag not in links]
        for tag in ages[:-keep_last]:
            if tag in there and tag not in kept:
                remove(there[tag])


def _recover(root: Path) -> None:
    """Completes the renames of a dead save, and removes its remains."""
    for path in sorted(root.iterdir()):
        left = LEFT.fullmatch(path.name)
        if left is None:
            continue
        if left["kind"] == OLD:
            final = root / left["tag"]
            if not folder.is_complete(path):
                continue
            if os.path.lexists(final):
                remove(path)
            else:
                path.rename(final)
        elif _is_dead(path):
            with contextlib.suppress(FileNotFoundError):
                _discard(path)


def _is_dead(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():  # a temporary `latest` that was not renamed
        try:
            return time.time() - path.lstat().st_mtime > 1.0
        except FileNotFoundError:
            return False
    try:
        descriptor = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    if descriptor is None:
        return time.time() - max(_times(path)) > UNLOCKABLE_AGE_S
    os.close(descriptor)
    return True


def _times(path: Path) -> Iterator[float]:
    yield path.stat().st_mtime
    for inner in path.iterdir():
        yield inner.stat().st_mtime


def _lock(path: Path) -> int | None:
    """Returns an exclusive lock on a folder, held until the descriptor is closed; None if the file system has no
    locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """Holds the lock on a directory, so that no other process changes names in it."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
