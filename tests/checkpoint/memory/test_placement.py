"""Who keeps what, and what is left after any loss: every small job, by brute force."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from ds_checkpoint.memory.placement import Generation, Ring, Transfer, newest_complete

JOBS = [
    [f"h{host}" for host, ranks in enumerate(sizes) for _ in range(ranks)]
    for hosts in range(1, 6)
    for sizes in product((1, 2, 3), repeat=hosts)
]


def generation(ring: Ring, alive: set[int], sequence: int = 1) -> Generation:
    """What the hosts that are alive have of a checkpoint."""
    size = sum(map(len, ring.hosts))
    kept = {
        host: frozenset(str(rank) for rank in range(size) if host in ring.keepers(rank)) for host in alive
    }
    files = frozenset(map(str, range(size)))
    return Generation(
        sequence=sequence, saved_at_s=0.0, digest="d", name=f"copy{sequence}", files=files, kept=kept
    )


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_what_survives_the_loss_of_hosts(copies: int) -> None:
    for names in JOBS:
        ring = Ring.of(names, copies)
        count = len(ring.hosts)
        assert ring.copies == min(copies, count - 1)
        for lost in range(count):
            for gone in map(set, combinations(range(count), lost)):
                left = generation(ring, set(range(count)) - gone)
                # A host's part is lost when it and the next hosts of the ring, which have its copies, are all gone.
                parts = [
                    rank
                    for host, ranks in enumerate(ring.hosts)
                    for rank in ranks
                    if all((host + step) % count in gone for step in range(ring.copies + 1))
                ]
                assert left.missing == sorted(map(str, parts))
                assert lost > ring.copies or not left.missing


@pytest.mark.parametrize("copies", [1, 2])
def test_each_file_goes_once_to_each_keeper_and_the_work_is_shared(copies: int) -> None:
    for names in JOBS:
        ring = Ring.of(names, copies)
        transfers = ring.transfers()
        assert len(set(transfers)) == len(transfers) == len(names) * ring.copies
        for rank in range(len(names)):
            targets = [ring.host_of(t.target) for t in transfers if t.source == rank]
            assert targets == list(ring.keepers(rank)[1:]) and ring.host_of(rank) not in targets
        for ranks in ring.hosts:
            received = [sum(t.target == rank for t in transfers) for rank in ranks]
            senders = sum(
                len(ring.hosts[(ring.host_of(ranks[0]) - k - 1) % len(ring.hosts)])
                for k in range(ring.copies)
            )
            assert sum(received) == senders
            assert max(received) <= sum(
                -(-len(ring.hosts[(ring.host_of(ranks[0]) - k - 1) % len(ring.hosts)]) // len(ranks))
                for k in range(ring.copies)
            )
        sizes = [10**rank for rank in range(len(names))]
        assert sum(ring.bytes_on_hosts(sizes)) == sum(sizes) * (ring.copies + 1)


def test_ranks_of_a_host_need_not_be_neighbours() -> None:
    ring = Ring.of(["a", "b", "a", "b", "a"], 1)
    assert ring.hosts == ((0, 2, 4), (1, 3))
    assert ring.transfers() == [
        Transfer(source=0, target=1),
        Transfer(source=2, target=3),
        Transfer(source=4, target=1),
        Transfer(source=1, target=0),
        Transfer(source=3, target=2),
    ]


def test_the_newest_complete_generation_wins() -> None:
    ring = Ring.of(["a", "b", "c"], 1)
    whole, old = generation(ring, {0, 1, 2}, 4), generation(ring, {0, 1, 2}, 3)
    half = generation(ring, {2}, 5)
    assert newest_complete([old, half, whole]) == (whole, [half])
    assert newest_complete([half]) == (None, [half])
    assert newest_complete([]) == (None, [])
    assert half.missing == ["0"]


def test_files_of_different_manifests_are_never_combined() -> None:
    """Two starts may have written different generations with one number, of which a lost host brings one back."""
    ring = Ring.of(["a", "b", "c"], 1)
    first = generation(ring, {0}, 5)
    second = Generation(**{**vars(generation(ring, {2}, 5)), "digest": "other"})
    assert newest_complete([first, second])[0] is None
    assert not generation(ring, {0, 2}, 5).missing
