"""A directory of checkpoints: how one appears there whole or not at all, and how one is found.

[Note: commit] A checkpoint is written into `<tag>.tmp-<nonce>/`, every file and the folder synced, the
manifest last, and so is the text that will replace `latest`: nothing below needs room on the disk. Then

    1. an older checkpoint of the same name is renamed to `<tag>.old-<nonce>`,
    2. the new one is renamed to `<tag>`, and the directory is synced: from here on it counts,
    3. `latest` is replaced by rename,
    4. the older one is renamed to a `.tmp-` name and removed.

A process may die between any two of these. Whatever is called `.tmp-` never counts and is removed by the next
save; an `.old-` folder stands for its tag exactly where `<tag>` is missing (death between 1 and 2). Nothing
is ever deleted under a name that counts, and nothing that is no checkpoint is ever renamed or deleted.

The writer holds a lock on its folder, which the system releases when it dies: so a save removes what dead
ones left, never what another process is writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import manifest

LATEST = "latest"
TEMPORARY, OLD = ".tmp-", ".old-"
_LEFT = re.compile(r"(?P<tag>.+)(?P<kind>\.tmp-|\.old-)[0-9a-f]{8}")
"""Names that only a save gives."""
UNLOCKABLE_AGE_S = 900.0
"""On a file system without locks, a temporary folder that was not touched for so long is dead."""


def check_tag(tag: str) -> str:
    """`tag`, if it can be the name of a checkpoint; else ValueError."""
    if not tag or tag in (".", "..", LATEST) or "/" in tag or "\0" in tag or TEMPORARY in tag or OLD in tag:
        raise ValueError(
            f'tag {tag!r} cannot name a checkpoint: it is a folder\'s name, without "/", "{TEMPORARY}" and '
            f'"{OLD}", and not "{LATEST}"'
        )
    return tag


def is_complete(path: Path) -> bool:
    """The manifest is written last, so where it is, everything is."""
    return (path / manifest.NAME).is_file()


def complete(root: Path) -> dict[str, Path]:
    """Tag -> folder of every complete checkpoint below `root`; empty if there is no such directory."""
    found: dict[str, Path] = {}
    if not root.is_dir():
        return found
    for path in sorted(root.iterdir()):
        left = _LEFT.fullmatch(path.name)
        if (left and left["kind"] == TEMPORARY) or not is_complete(path):
            continue
        if left:
            found.setdefault(left["tag"], path)
        else:
            found[path.name] = path
    return found


def newest(root: Path) -> str | None:
    """The tag of the checkpoint that was saved last, by what the manifests say; damaged manifests do not
    count.
    """
    order = by_age(root)
    return order[-1] if order else None


def by_age(root: Path) -> list[str]:
    """The tags of all checkpoints with a sound manifest, oldest first."""
    ages: list[tuple[float, str]] = []
    for tag, path in complete(root).items():
        with contextlib.suppress(CheckpointError, OSError):
            # Not the files' times: copying a directory changes those, and pruning would take the wrong ones.
            ages.append((read_manifest(path).saved_at_s, tag))
    return [tag for _, tag in sorted(ages)]


def read_manifest(path: Path) -> manifest.Manifest:
    """CheckpointError if it is damaged."""
    file = path / manifest.NAME
    return manifest.load(file.read_bytes(), file)


def named_latest(root: Path) -> str | None:
    """What `latest` says, if there is such a file."""
    try:
        return (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def latest(root: str | os.PathLike[str]) -> str | None:
    """The tag that a load from `root` would take; None if there is nothing complete (or no such directory).

    Examples:
        `if ds_checkpoint.latest(directory): engine.load_checkpoint(directory)`
    """
    directory = Path(root)
    named = named_latest(directory)
    return named if named in complete(directory) else newest(directory)


def find(root: Path, tag: str | None) -> Path:
    """The folder of a checkpoint.

    Raises:
        FileNotFoundError: says what was looked for and what there is.
    """
    there = complete(root)
    if tag is not None:
        if tag not in there:
            raise FileNotFoundError(f"no checkpoint {tag!r} in {root}: {_contents(root, there)}")
        return there[tag]
    named = named_latest(root)
    if named in there:
        assert named is not None
        later = _later(there, named)
        if later is not None:
            warnings.warn(
                f"{root}: 'latest' names {named!r}, but {later!r} was saved after it: an interrupted save, an edit by "
                f"hand, or damage; {named!r} is taken, tag={later!r} takes the other",
                stacklevel=2,
            )
        return there[named]
    found = newest(root)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {root}: {_contents(root, there)}")
    said = "there is no file 'latest'" if named is None else f"'latest' names {named!r}, which is not there"
    warnings.warn(
        f"{root}: {said}; the newest complete checkpoint, {found!r}, is taken instead", stacklevel=2
    )
    return there[found]


def _later(there: dict[str, Path], named: str) -> str | None:
    """The newest of the checkpoints that became the latest after `named`: the file `latest` has no checksum, and a
    flipped bit in it can make the name of another checkpoint. Manifests are peeked at: they may be large.
    """
    found: dict[str, tuple[float, bool]] = {}
    for tag, path in there.items():
        with contextlib.suppress(OSError), (path / manifest.NAME).open("rb") as file:
            peeked = manifest.peek(file.read(manifest.PEEK_BYTES))
            if peeked is not None:
                found[tag] = peeked
    if named not in found:
        return None
    later = {tag: at for tag, (at, became) in found.items() if became and at > found[named][0]}
    return max(later, key=later.__getitem__) if later else None


def _contents(root: Path, there: dict[str, Path]) -> str:
    if not root.exists():
        parent = root.parent
        siblings = sorted(p.name for p in parent.iterdir() if p.is_dir())[:8] if parent.is_dir() else []
        has = (
            f"; {parent} has {', '.join(siblings)}"
            if siblings
            else f"; {parent} does not exist either" * (not parent.is_dir())
        )
        return f"there is no such directory{has}"
    if there:
        return f"complete ones are {', '.join(sorted(there))}"
    inside = sorted(p.name for p in root.iterdir())[:8]
    return f"it has {', '.join(inside)}, none of which is a complete checkpoint" if inside else "it is empty"


def sync(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class Staging:
    """The folder that a save writes into, on the rank that commits it."""

    def __init__(self, root: Path, tag: str, *, name_latest: bool = True) -> None:
        """Clear up after dead saves, and make the folder.

        Args:
            name_latest: `latest` will name this one.

        Raises:
            OSError: that is not possible, or `<root>/<tag>` is something else than a checkpoint.
        """
        made = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync(path.parent)
        _recover(root)
        self.root = root
        self.tag = tag
        self.nonce = secrets.token_hex(4)
        self.path = root / f"{tag}{TEMPORARY}{self.nonce}"
        self.names_latest = name_latest
        self._pointer = root / f"{LATEST}{TEMPORARY}{self.nonce}" if name_latest else None
        if (root / tag).exists() and not is_complete(root / tag):
            raise FileExistsError(f"{root / tag} exists and is no checkpoint of ours: choose another tag")
        self.path.mkdir()
        self._lock = _lock(self.path)

    def commit(self) -> Path:
        """See [Note: commit]; returns the folder under its name that counts."""
        sync(self.path)
        if self._pointer is not None:
            write_synced(self._pointer, self.tag.encode())
        final = self.root / self.tag
        old = self.root / f"{self.tag}{OLD}{self.nonce}"
        replaces = final.exists()
        if replaces:
            final.rename(old)
        try:
            self.path.rename(final)
        except OSError:
            if replaces:
                old.rename(final)
            raise
        sync(self.root)
        if self._pointer is not None:
            self._pointer.rename(self.root / LATEST)
            sync(self.root)
        if replaces:
            remove(old)
        self._unlock()
        return final

    def abort(self) -> None:
        """Leave nothing behind; safe after a failed commit too."""
        self._unlock()
        if self._pointer is not None:
            self._pointer.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove(path: Path) -> None:
    """Delete a checkpoint: first it loses the name under which it counts, then its files."""
    left = _LEFT.fullmatch(path.name)
    doomed = path.with_name(f"{left['tag'] if left else path.name}{TEMPORARY}{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def prune(root: Path, keep_last: int, keep: str) -> None:
    """Remove all but the newest `keep_last` checkpoints; `keep` stays in any case."""
    for tag in by_age(root)[:-keep_last]:
        if tag != keep:
            remove(complete(root)[tag])


def _recover(root: Path) -> None:
    """Finish what a dead save began, and remove what it left."""
    for path in sorted(root.iterdir()):
        left = _LEFT.fullmatch(path.name)
        if left is None:
            continue
        if left["kind"] == OLD:
            final = root / left["tag"]
            if not is_complete(path):
                continue
            if final.exists():
                remove(path)
            else:
                path.rename(final)
        elif _is_dead(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_dead(path: Path) -> bool:
    if not path.is_dir():  # a pointer that was not renamed: written and renamed within milliseconds
        return time.time() - path.stat().st_mtime > 1.0
    try:
        descriptor = _lock(path)
    except BlockingIOError:
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
    """An exclusive lock on a folder, held until the descriptor is closed; None where the file system has
    none.

    Raises:
        BlockingIOError: a living process holds it.
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
