"""Copies of a checkpoint in the memory of hosts: written by all ranks, found and read by those of the next start."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import datafile, manifest
from ds_checkpoint.format.manifest import Manifest
from ds_checkpoint.memory import host_folder
from ds_checkpoint.memory.checkpoint import MemoryCheckpoint, Source
from ds_checkpoint.memory.host_folder import HostFolder, Needs
from ds_checkpoint.memory.placement import Generation, Ring, newest_complete
from ds_checkpoint.memory.serving import FileServer
from ds_checkpoint.memory.transfer import Parcel, replicate
from ds_checkpoint.team import Team
from ds_checkpoint.write.writer import Content, described, merged, write_file

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DOING = "copying the state into the memory of hosts"
_PLACES = "copies"
"""Key of the manifest's values: which host kept which file."""


class MemoryCopies:
    """Keeps the newest state of a job in the memory of its hosts. All ranks must call each method.

    Each host keeps the files of its own ranks, and those of the `copies` hosts before it in the ring of hosts, in a
    folder in memory (/dev/shm; the variable DS_MEMORY_FOLDER names another one). They outlive the processes of the job:
    the next start with the same job name reads them, on any number of ranks and hosts.

    [Note: replacing a generation] A new generation is written beside the old one. When every host has written and
    checked all its files, each renames its folder, and only when all have done so the old one is removed. So at every
    moment one generation is complete, and a host keeps at most two.
    """

    def __init__(self, copies: int = 1, *, job: str | None = None) -> None:
        """Prepares the folder on each host.

        Args:
            copies: number of other hosts that keep each rank's part. So many hosts may be lost at once.
            job: name of the job, the same at every start and different from that of other jobs on these hosts.
                Default: the one that `ds run` gives (DS_JOB), or torchrun's run id.

        Raises:
            ValueError: `copies` is less than 1, or the job has no name.
            CheckpointError: on every rank, if the folder cannot be used on a host.
        """
        if copies < 1:
            raise ValueError(f"copies is {copies}, but at least 1 is required: a copy on another host")
        job = host_folder.job_name(job)
        self.path = host_folder.folder_of(job)
        """The folder on this host."""
        parallel = dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own, on the CPU, whatever the backend of the default group is.
        self._group = dist.new_group(backend="gloo") if parallel else None
        self._team = Team(self._group)
        self._folder: HostFolder | None = None
        self._sequence = 0
        self._saved_at_s = 0.0
        try:
            hosts = self._agreed(job, copies)
            self.ring = Ring.of([f"{name} {boot}" for name, boot in hosts], copies)
            """Which host keeps what."""
            self.hosts = tuple(hosts[ranks[0]][0] for ranks in self.ring.hosts)
            """Names of the hosts, in the order of the ring."""
            self._host = self.ring.host_of(self._team.rank)
            self._team.together(_DOING, self._prepare)
            self._team.together(_DOING, self._check_visible)
            self._generations()
        except BaseException:
            self.close()
            raise
        self._warn_about_hosts([boot for _, boot in dict.fromkeys(hosts)], copies)

    def _agreed(self, job: str, copies: int) -> list[tuple[str, str]]:
        """Returns name and boot id of each rank's host. Raises CheckpointError if ranks differ in their arguments."""
        here = {"host": socket.gethostname(), "boot": _boot_id(), "job": job, "copies": copies}
        everyone = [json.loads(part) for part in self._team.exchange(json.dumps(here).encode())]
        self._team.together(_DOING, lambda: _check_same(here, everyone))
        return [(of_rank["host"], of_rank["boot"]) for of_rank in everyone]

    @property
    def _leads(self) -> bool:
        """Whether this rank creates and removes what is in the folder of its host."""
        return self.ring.hosts[self._host][0] == self._team.rank

    def _prepare(self) -> None:
        if self._leads:
            self._folder = HostFolder(self.path)
            host_folder.remove_dead(self.path.parent, self.path)

    def _check_visible(self) -> None:
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not there for this rank, although a rank of the same host name created it: all ranks "
                "of a host must share the folder (containers: mount the same one), or have different host names"
            )

    def _warn_about_hosts(self, boots: list[str], copies: int) -> None:
        if not self._team.first:
            return
        if len(self.hosts) == 1:
            warnings.warn(
                f"all ranks are on {self.hosts[0]}: its memory has the only copy of the state, which survives the end "
                "of processes, but not the loss of this host",
                stacklevel=4,
            )
        elif self.ring.copies < copies:
            warnings.warn(
                f"{copies} copies were asked for, and {len(self.hosts)} hosts can keep {self.ring.copies}",
                stacklevel=4,
            )
        if len(set(boots) - {""}) < len(boots):
            warnings.warn(
                f"some of the hosts {', '.join(self.hosts)} are containers on one machine (same boot id), and copies "
                "do not survive its loss",
                stacklevel=4,
            )

    # --- writing

    def write(self, content: Callable[[], Content]) -> str:
        """Writes a new generation, and removes the old one when the new one is complete on every host.

        Args:
            content: returns this rank's content; called once.

        Returns:
            The folder of the generation on this host.

        Raises:
            CheckpointError: on every rank, if any rank failed. The old generation is untouched.
            LostRanksError: a rank is gone. One generation is complete, the old or the new one.
        """
        team, sequence = self._team, self._sequence + 1
        staged = host_folder.staging(self.path, sequence)
        mine, needs = self._counted(content)
        try:
            team.together(_DOING, lambda: self._lead(lambda folder: folder.begin(staged, needs)))
            fragment = team.together(_DOING, lambda: write_file(staged, team, mine))
            if self._group is not None:
                name = json.loads(fragment)["file"]
                parcel = Parcel(path=staged / name, fragment=fragment)
                replicate(team, self._group, parcel, self.ring.transfers(), _DOING)
            whole = self._whole(team.gather(fragment), sequence)
            team.together(_DOING, lambda: self._lead(lambda _: _write_manifest(staged, whole)))
            team.together(_DOING, lambda: self._lead(lambda folder: folder.commit(staged)))
        except BaseException:
            if self._leads:
                shutil.rmtree(staged, ignore_errors=True)
            raise
        self._sequence = sequence
        if self._folder is not None:
            try:
                self._folder.keep_only(sequence)
                host_folder.remove_dead(self.path.parent, self.path)
            except OSError as error:
                warnings.warn(f"the old copy in {self.path} could not be removed: {error}", stacklevel=3)
        return str(self.path / host_folder.generation_name(sequence))

    def check(self, content: Callable[[], Content]) -> None:
        """Counts the memory that copies of this content need.

        Raises:
            CheckpointError: on every rank, if a host has too little. The message has the numbers.
        """
        _, needs = self._counted(content)
        self._team.together(_DOING, lambda: self._lead(lambda folder: folder.check_free(needs)))

    def _counted(self, content: Callable[[], Content]) -> tuple[Content, Needs]:
        """Returns this rank's content, and what this host needs for one generation."""

        def count() -> tuple[Content, int]:
            mine = content()
            return mine, datafile.layout(described(mine)[0]).num_bytes

        mine, size = self._team.together(_DOING, count)
        sizes = [int(part) for part in self._team.exchange(str(size).encode())]
        own = sum(sizes[rank] for rank in self.ring.hosts[self._host])
        return mine, Needs(own=own, copied=self.ring.bytes_on_hosts(sizes)[self._host] - own)

    def _lead(self, action: Callable[[HostFolder], None]) -> None:
        """Calls `action` on one rank of each host."""
        if self._folder is not None:
            action(self._folder)

    def _whole(self, fragments: list[bytes], sequence: int) -> bytes:
        """Returns the bytes of the manifest on every rank; `fragments` are on rank 0."""

        def merge() -> bytes:
            if not self._team.first:
                return b""
            stored = merged(
                fragments, host_folder.generation_name(sequence), sequence=sequence, names_latest=False
            )
            # The clock of another host, on which rank 0 was before, may have been ahead.
            self._saved_at_s = max(stored.saved_at_s, self._saved_at_s + 1e-3)
            files = [json.loads(fragment)["file"] for fragment in fragments]
            places = {
                "hosts": list(self.hosts),
                "keepers": {file: self.ring.keepers(rank) for rank, file in enumerate(files)},
            }
            values = {**stored.values, _PLACES: places}
            return manifest.dump(dataclasses.replace(stored, saved_at_s=self._saved_at_s, values=values))

        return self._team.share(self._team.together(_DOING, merge))

    # --- reading

    def newest(self) -> Generation | None:
        """Returns the newest generation of which the hosts of this start have every part; None if there is none. It
        warns of newer ones that are incomplete, and says which parts are lost.
        """
        found, incomplete = newest_complete(self._generations())
        for generation in incomplete if self._team.first else ():
            warnings.warn(
                f"{generation.name}, which was saved at {time.ctime(generation.saved_at_s)}, cannot be used, because "
                f"parts of it are in the memory of no host of this job: {generation.loss}",
                stacklevel=2,
            )
        return found

    def open(self, generation: Generation) -> MemoryCheckpoint:
        """Opens a generation that `newest` returned. All ranks must close it, too.

        Raises:
            CheckpointError: it is no longer there.
        """
        first = self.ring.hosts[min(generation.kept)][0]
        here = self.path / generation.name
        raw = self._team.together(
            _DOING_READ, lambda: (here / manifest.NAME).read_bytes() if self._team.rank == first else b""
        )
        stored = manifest.load(self._team.share(raw, first), here / manifest.NAME)
        names = sorted(stored.files)
        sources = {name: self._sources(generation, name, number) for number, name in enumerate(names)}
        return MemoryCheckpoint(here, stored, sources, FileServer(self._team, here, names))

    def _sources(self, generation: Generation, name: str, number: int) -> list[Source]:
        """Where a file is: this host first, then the next ones in the ring."""
        count = len(self.hosts)
        order = [(self._host + step) % count for step in range(count)]
        return [
            Source(rank=None if host == self._host else self.ring.share(host, number), host=self.hosts[host])
            for host in order
            if name in generation.kept.get(host, ())
        ]

    def _generations(self) -> list[Generation]:
        """Lists what all hosts have."""
        listed = self._team.together(_DOING_READ, lambda: self._listed() if self._leads else {})
        everyone = [json.loads(part) for part in self._team.exchange(json.dumps(listed).encode())]
        largest = max((of_host.get("largest", 0) for of_host in everyone), default=0)
        self._sequence = max(self._sequence, largest)
        generations = _joined(
            (number, everyone[ranks[0]]["generations"]) for number, ranks in enumerate(self.ring.hosts)
        )
        self._saved_at_s = max([self._saved_at_s, *(g.saved_at_s for g in generations)])
        return generations

    def _listed(self) -> dict[str, Any]:
        """What this host has, as JSON."""
        assert self._folder is not None
        return {
            "largest": self._folder.largest_sequence(),
            "generations": [
                {
                    "name": path.name,
                    "sequence": stored.sequence,
                    "saved_at_s": stored.saved_at_s,
                    "digest": digest,
                    "files": sorted(stored.files),
                    "kept": sorted(host_folder.kept_files(path, stored)),
                    "saved_on": _saved_on(stored),
                }
                for path, (stored, digest) in self._folder.generations().items()
            ],
        }

    # --- the end

    def remove(self) -> None:
        """Removes all copies and closes, for a job that has ended well and will not be started again."""
        self._team.together(
            "removing copies in memory", lambda: self._lead(lambda folder: shutil.rmtree(folder.path))
        )
        self.close()

    def close(self) -> None:
        """Lets the copies stay, for the next start. Safe to call twice."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


_DOING_READ = "reading the state from the memory of hosts"


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _check_same(here: Mapping[str, Any], everyone: list[Mapping[str, Any]]) -> None:
    for key in ("job", "copies"):
        if here[key] != everyone[0][key]:
            raise ValueError(
                f"{key} is {here[key]!r} here and {everyone[0][key]!r} on rank 0: pass the same on every rank"
            )


def _write_manifest(staged: Path, whole: bytes) -> None:
    (staged / manifest.NAME).write_bytes(whole)


def _saved_on(stored: Manifest) -> dict[str, list[str]]:
    places = stored.values.get(_PLACES, {"hosts": [], "keepers": {}})
    return {file: [places["hosts"][host] for host in hosts] for file, hosts in places["keepers"].items()}


def _joined(hosts: Iterable[tuple[int, list[dict[str, Any]]]]) -> list[Generation]:
    """Joins what each host has of the same generation, which is one with the same manifest."""
    kept: dict[tuple[int, str], dict[int, frozenset[str]]] = {}
    about: dict[tuple[int, str], dict[str, Any]] = {}
    for number, generations in hosts:
        for of_host in generations:
            key = of_host["sequence"], of_host["digest"]
            about[key] = of_host
            kept.setdefault(key, {})[number] = frozenset(of_host["kept"])
    return [
        Generation(
            sequence=key[0],
            digest=key[1],
            saved_at_s=about[key]["saved_at_s"],
            name=about[key]["name"],
            files=frozenset(about[key]["files"]),
            kept=kept[key],
            saved_on={file: tuple(names) for file, names in about[key]["saved_on"].items()},
        )
        for key in kept
    ]
