"""Which host keeps which rank's file, which rank sends it there, and what is left after a loss: pure functions.

Hosts form a ring in the order of their first ranks. The file of a rank is kept by its own host and by the next
`copies` hosts of the ring. So any `copies` hosts may be lost at once (and more, if no `copies` + 1 of them are
neighbours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One rank's file goes to another host."""

    source: int
    """Rank that sends it: the one that wrote it."""
    target: int
    """Rank that receives it for its host."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The hosts of a job."""

    hosts: tuple[tuple[int, ...], ...]
    """For each host, its ranks in ascending order; hosts in the order of their first ranks."""
    copies: int
    """Number of further hosts that keep each rank's file; less than the number of hosts."""

    @classmethod
    def of(cls, names: Sequence[str], copies: int) -> Ring:
        """Makes the ring from the host of each rank. There are fewer copies if there are not enough hosts."""
        ranks: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            ranks.setdefault(name, []).append(rank)
        return cls(hosts=tuple(map(tuple, ranks.values())), copies=min(copies, len(ranks) - 1))

    def host_of(self, rank: int) -> int:
        """Returns the number of a rank's host."""
        return next(number for number, ranks in enumerate(self.hosts) if rank in ranks)

    def keepers(self, rank: int) -> tuple[int, ...]:
        """Returns the numbers of the hosts that keep a rank's file, its own first."""
        own = self.host_of(rank)
        return tuple((own + step) % len(self.hosts) for step in range(self.copies + 1))

    def transfers(self) -> list[Transfer]:
        """Returns what is sent. The ranks of a host share the receiving evenly, also if the sending host has another
        number of ranks.
        """
        return [
            Transfer(source=rank, target=self.share(keeper, index))
            for ranks in self.hosts
            for index, rank in enumerate(ranks)
            for keeper in self.keepers(rank)[1:]
        ]

    def share(self, host: int, number: int) -> int:
        """Returns the rank of a host that does the work with this number."""
        ranks = self.hosts[host]
        return ranks[number % len(ranks)]

    def bytes_on_hosts(self, sizes: Sequence[int]) -> list[int]:
        """Returns how many bytes each host keeps of one checkpoint, from the size of each rank's file."""
        kept = [0] * len(self.hosts)
        for rank, size in enumerate(sizes):
            for keeper in self.keepers(rank):
                kept[keeper] += size
        return kept


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One checkpoint of which hosts keep files, as far as the hosts that are there know it."""

    sequence: int
    """Each save uses one more than the largest that any host of the job knew."""
    saved_at_s: float
    """Seconds since 1970, by the clock of rank 0."""
    digest: str
    """Checksum of the manifest. Files that belong to different manifests are never combined."""
    name: str
    """Of its folder."""
    files: frozenset[str]
    """All files that it consists of."""
    kept: Mapping[int, frozenset[str]]
    """Number of a host -> the files that it has."""
    saved_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """File -> names of the hosts that kept it when it was saved."""

    @property
    def missing(self) -> list[str]:
        """The files that no host has."""
        return sorted(self.files.difference(*self.kept.values()))

    @property
    def loss(self) -> str:
        """Which parts are missing, and which hosts had them, for messages."""
        parts = [f"{file} (was on {' and '.join(self.saved_on.get(file, ['?']))})" for file in self.missing]
        return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")


def newest_complete(generations: Iterable[Generation]) -> tuple[Generation | None, list[Generation]]:
    """Returns the newest generation of which every file is on some host, and the newer ones that are incomplete."""
    incomplete: list[Generation] = []
    for generation in sorted(generations, key=lambda g: (g.sequence, g.saved_at_s, g.digest), reverse=True):
        if not generation.missing:
            return generation, incomplete
        incomplete.append(generation)
    return None, incomplete
