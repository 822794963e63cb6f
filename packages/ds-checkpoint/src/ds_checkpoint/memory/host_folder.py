"""The folder of one job in the memory of one host.

    /dev/shm/ds-copies-<user id>-<job>/
      copy00000012/             a complete generation: the manifest, and the files that this host keeps
      copy00000013.tmp-/         one that is being written; never read, and removed by the next start

Only the ranks of this host use it. One of them, the leader, creates and removes what is in it, and holds a lock on it
while its process lives. A folder without a lock belongs to a job that is between two starts, or is dead: see
`remove_dead`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from ds_checkpoint.disk.crc import crc32c
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import manifest
from ds_checkpoint.format.folder import TEMPORARY
from ds_checkpoint.format.manifest import Manifest
from ds_checkpoint.memory import capacity

BASE = "DS_MEMORY_FOLDER"
"""Environment variable with the folder in memory in which jobs have theirs. Default: /dev/shm."""
JOB = "DS_JOB"
"""Environment variable with the job's name, which is the same at every restart. `ds run` sets it."""
_DEFAULT_BASE = "/dev/shm"
_PREFIX = "ds-copies-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_GENERATION = re.compile(r"copy\d{8,}")
_UNUSED = "unused"
"""A file in a folder without a lock: when another job saw it first."""
DEAD_S = 900.0
"""A folder that nobody has used for this time is that of a dead job. Between two starts a job needs less."""
LOCK_S = 15.0
"""How long a start waits for the processes of the previous one to end."""


def job_name(given: str | None) -> str:
    """Returns the name of this job, by default from the launcher.

    Raises:
        ValueError: there is none, or it cannot be part of a file name.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    name = given or os.environ.get(JOB) or (run_id if run_id != "none" else "")
    if not name:
        raise ValueError(
            f"copies in memory are found again under the name of the job, and this one has none: start it by `ds run`, "
            f"by torchrun with --rdzv-id, or set {JOB} to the same unique name at every start"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the job name {name!r} must consist of at most 100 letters, digits and the signs _ . -"
        )
    return name


def folder_of(job: str) -> Path:
    """Returns the folder of a job of this user."""
    return Path(os.environ.get(BASE) or _DEFAULT_BASE) / f"{_PREFIX}{os.getuid()}-{job}"


def generation_name(sequence: int) -> str:
    """Returns the name of the folder of a generation."""
    return f"copy{sequence:08d}"


def staging(path: Path, sequence: int) -> Path:
    """Returns the folder in which a generation is written, in the folder of the job."""
    return path / f"{generation_name(sequence)}{TEMPORARY}"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a host needs for one generation, in bytes."""

    own: int
    """What its own ranks write."""
    copied: int
    """Copies for other hosts."""


class HostFolder:
    """The folder of this job on this host, as its leader uses it."""

    def __init__(self, path: Path) -> None:
        """Creates it or takes it over from the previous start, and removes what that one left half written.

        Raises:
            CheckpointError: another running job has the same name, or the folder is not ours.
        """
        self.path = path
        if not path.parent.is_dir():
            raise CheckpointError(
                f"{path.parent} does not exist: set {BASE} to a folder in memory (tmpfs) that exists on every host"
            )
        path.mkdir(mode=0o700, exist_ok=True)
        there = path.lstat()
        if path.is_symlink() or there.st_uid != os.getuid() or there.st_mode & 0o077:
            raise CheckpointError(
                f"{path} is not a folder that only this user can read: somebody else has created it; remove it"
            )
        self._lock = _locked(path, LOCK_S)
        if self._lock is None:
            raise CheckpointError(
                f"{path} is in use: another job on this host has the same name; set {JOB} to a unique one"
            )
        path.mkdir(mode=0o700, exist_ok=True)  # another job has just removed it, if it was unused for so long
        (path / _UNUSED).unlink(missing_ok=True)
        for left in path.iterdir():
            if TEMPORARY in left.name:
                shutil.rmtree(left)

    def generations(self) -> dict[Path, tuple[Manifest, str]]:
        """Returns folder -> manifest of each generation and its checksum. One with a damaged manifest does not
        count.
        """
        seen = {}
        for path in sorted(self.path.iterdir()):
            if _GENERATION.fullmatch(path.name):
                with contextlib.suppress(CheckpointError, OSError):
                    raw = (path / manifest.NAME).read_bytes()
                    seen[path] = manifest.load(raw, path / manifest.NAME), crc32c(raw)
        return seen

    def largest_sequence(self) -> int:
        """Returns the largest sequence number of any generation here, complete or not; 0 if there is none."""
        names = (path.name for path in self.path.iterdir() if _GENERATION.fullmatch(path.name))
        return max((int(name.removeprefix("copy")) for name in names), default=0)

    def begin(self, staged: Path, needs: Needs) -> None:
        """Creates the folder of a new generation.

        Raises:
            CheckpointError: see `check_free`.
        """
        shutil.rmtree(staged, ignore_errors=True)  # of a write that has failed
        self.check_free(needs)
        staged.mkdir(mode=0o700)

    def check_free(self, needs: Needs) -> None:
        """Raises CheckpointError unless memory has room for two generations."""
        free, limit = capacity.free_bytes(self.path)
        wanted, used = 2 * (needs.own + needs.copied), _num_bytes(self.path)
        if free + used >= wanted:
            return
        others = {other: _num_bytes(other) for other in _others(self.path.parent, self.path)}
        beside = "; ".join(
            f"{other} has {size} bytes of another job" for other, size in others.items() if size
        )
        raise CheckpointError(
            f"{socket.gethostname()} has too little memory for copies: {wanted} bytes are needed in "
            f"{self.path.parent}, 2 x ({needs.own} of its own ranks + {needs.copied} of other hosts) while one "
            f"generation replaces another, and {limit} leaves {free + used}{f' ({beside})' if beside else ''}: enlarge "
            f"it (mount -o remount,size=..., docker --shm-size), set {BASE} to another folder in memory, or keep fewer "
            "copies"
        )

    def commit(self, staged: Path) -> None:
        """Makes a generation valid."""
        staged.rename(staged.with_name(staged.name.partition(TEMPORARY)[0]))

    def keep_only(self, sequence: int) -> None:
        """Removes all generations but one."""
        for path in self.path.iterdir():
            if _GENERATION.fullmatch(path.name) and path.name != generation_name(sequence):
                _remove(path)

    def close(self) -> None:
        """Releases the lock; the files stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def kept_files(path: Path, stored: Manifest) -> frozenset[str]:
    """Returns the files of a generation that are in its folder here, with their sizes."""
    kept = set()
    for name, info in stored.files.items():
        with contextlib.suppress(OSError):
            if (path / name).stat().st_size == info.num_bytes:
                kept.add(name)
    return frozenset(kept)


def _num_bytes(path: Path) -> int:
    """Returns the size of all files in a folder, some of which may vanish meanwhile."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def _others(base: Path, own: Path) -> list[Path]:
    """Returns the folders of other jobs of this user."""
    there = sorted(base.glob(f"{_PREFIX}{os.getuid()}-*"))
    return [path for path in there if path != own and path.is_dir() and not path.is_symlink()]


def _remove(path: Path) -> None:
    """Deletes a generation, first its name."""
    doomed = path.with_name(f"{path.name}{TEMPORARY}removed")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_dead(base: Path, own: Path, now_s: float | None = None) -> None:
    """Removes the folders of dead jobs of this user.

    A job between two starts has no process on its hosts, as a dead one has none. So the first look at a folder without
    a lock only notes the time in it, and a look after `DEAD_S` removes it, unless the job has used it again.
    """
    now_s = time.time() if now_s is None else now_s
    for path in _others(base, own):
        with contextlib.suppress(OSError):  # it vanishes, or another job of this user removes it
            descriptor = _locked(path, 0.0)
            if descriptor is None:
                continue
            try:
                mark = path / _UNUSED
                if not mark.exists():
                    mark.touch()
                    os.utime(mark, (now_s, now_s))
                elif now_s - mark.stat().st_mtime > DEAD_S:
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _locked(path: Path, seconds: float) -> int | None:
    """Returns an exclusive lock on a folder, held until the descriptor is closed; None if others hold it so long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                os.close(descriptor)
                return None
            time.sleep(0.1)
        except BaseException:
            os.close(descriptor)
            raise
