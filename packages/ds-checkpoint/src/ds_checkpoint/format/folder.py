"""Reads a directory of checkpoints: which exist, which is the latest, and where each is.

`write/staging.py`, [Note: commit], describes how a checkpoint appears atomically.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from pathlib import Path

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import manifest

LATEST = "latest"
TEMPORARY, OLD = ".tmp-", ".old-"
LEFT = re.compile(r"(?P<tag>.+)(?P<kind>\.tmp-|\.old-)[0-9a-f]{8}")
"""Pattern of the names that only a save creates."""
MAX_TAG_BYTES = 240
"""A file name has at most 255 bytes, and the name of a temporary folder has 13 more than the tag."""


def check_tag(tag: str) -> str:
    """Returns `tag`; raises ValueError if it cannot be the name of a checkpoint."""
    if not tag or tag in (".", "..", LATEST) or "/" in tag or "\0" in tag or TEMPORARY in tag or OLD in tag:
        raise ValueError(
            f'tag {tag!r} cannot name a checkpoint: it must be the name of a folder, without "/", "{TEMPORARY}" and '
            f'"{OLD}", and not "{LATEST}"'
        )
    if len(os.fsencode(tag)) > MAX_TAG_BYTES:
        raise ValueError(
            f"tag {tag[:20]!r}... cannot name a checkpoint: it has {len(os.fsencode(tag))} bytes, but at most "
            f"{MAX_TAG_BYTES} are allowed"
        )
    return tag


def is_complete(path: Path) -> bool:
    """Whether the checkpoint is complete: its manifest is written last."""
    return os.path.isfile(
        path / manifest.NAME
    )  # unlike Path.is_file, it returns False for a name that is too long


def complete(root: Path) -> dict[str, Path]:
    """Returns tag -> folder of every complete checkpoint in `root`; empty if the directory does not exist."""
    there: dict[str, Path] = {}
    if not os.path.isdir(root):
        return there
    for path in sorted(root.iterdir()):
        left = LEFT.fullmatch(path.name)
        if (left and left["kind"] == TEMPORARY) or path.name == LATEST or not is_complete(path):
            continue
        if left:
            there.setdefault(left["tag"], path)
        else:
            there[path.name] = path
    return there


def newest(root: Path) -> str | None:
    """Returns the tag of the checkpoint that was saved last, according to the manifests. Damaged manifests are
    ignored.
    """
    there = complete(root)
    for tag in reversed(by_age(root)):
        with contextlib.suppress(CheckpointError, OSError, KeyError):
            read_manifest(there[tag])
            return tag
    return None


def by_age(root: Path) -> list[str]:
    """Returns the tags of all checkpoints with a readable manifest, oldest first."""
    # Not by the files' times: copying a directory changes them, and pruning would remove the wrong checkpoints.
    return [tag for _, tag in sorted((age, tag) for tag, (age, _) in peeked(root).items())]


def peeked(root: Path) -> dict[str, tuple[manifest.Age, bool]]:
    """Returns tag -> age, and whether the save made `latest` name it. Only the beginning of each manifest is read,
    because manifests may be many and large, so nothing is verified.
    """
    seen: dict[str, tuple[manifest.Age, bool]] = {}
    for tag, path in complete(root).items():
        with contextlib.suppress(OSError), (path / manifest.NAME).open("rb") as file:
            beginning = manifest.peek(file.read(manifest.PEEK_BYTES))
            if beginning is not None:
                seen[tag] = beginning
    return seen


def next_sequence(root: Path) -> int:
    """Returns one more than the largest sequence number in `root`."""
    return 1 + max((age.sequence for age, _ in peeked(root).values()), default=0)


def read_manifest(path: Path) -> manifest.Manifest:
    """Reads the manifest; raises CheckpointError if it is damaged."""
    file = path / manifest.NAME
    return manifest.load(file.read_bytes(), file)


def named_latest(root: Path) -> str | None:
    """Returns the tag in the file `latest`, if it exists. If `latest` is a link to a checkpoint beside it, returns
    that name.
    """
    path = root / LATEST
    try:
        return path.read_bytes()[: 2 * MAX_TAG_BYTES].decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        return path.resolve().name if path.is_symlink() else None


def lost_latest(root: Path) -> str | None:
    """Returns the tag that `latest` names if no such checkpoint exists; else None."""
    named, there = named_latest(root), complete(root)
    return named if there and named is not None and named not in there else None


def latest(root: str | os.PathLike[str]) -> str | None:
    """Returns the tag that a load from `root` would use; None if there is no complete checkpoint or no such
    directory.

    Examples:
        `if ds_checkpoint.latest(directory): engine.load_checkpoint(directory)`
    """
    directory = Path(root)
    named = named_latest(directory)
    return named if named in complete(directory) else newest(directory)


def find(root: Path, tag: str | None) -> Path:
    """Returns the folder of a checkpoint.

    Raises:
        FileNotFoundError: there is none. The message lists the contents of `root`.
    """
    there = complete(root)
    if tag is not None:
        if tag not in there:
            raise FileNotFoundError(f"no checkpoint {tag!r} in {root}: {_contents(root, there)}")
        return there[tag]
    named = named_latest(root)
    if named in there:
        assert named is not None
        later = _later(root, named)
        if later is not None:
            warnings.warn(
                f"{root}: 'latest' names {named!r}, but {later!r} was saved after it: an interrupted save, an edit by "
                f"hand, or damage; {named!r} is loaded; pass tag={later!r} to load the other",
                stacklevel=2,
            )
        return there[named]
    taken = newest(root)
    if taken is None:
        raise FileNotFoundError(f"no checkpoint in {root}: {_contents(root, there)}")
    if named is None:
        why = "'latest' is a folder" if os.path.isdir(root / LATEST) else "there is no file 'latest'"
    else:
        why = f"'latest' names {named!r}, which does not exist"
    warnings.warn(
        f"{root}: {why}; the newest complete checkpoint, {taken!r}, is loaded instead", stacklevel=2
    )
    return there[taken]


def _later(root: Path, named: str) -> str | None:
    """Returns the newest checkpoint that became the latest after `named`, if any. The file `latest` has no checksum,
    and a flipped bit in it can produce the name of another checkpoint.
    """
    seen = peeked(root)
    if named not in seen:
        return None
    later = {tag: age for tag, (age, became) in seen.items() if became and age > seen[named][0]}
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
    return (
        f"it contains {', '.join(inside)}, none of which is a complete checkpoint"
        if inside
        else "it is empty"
    )
