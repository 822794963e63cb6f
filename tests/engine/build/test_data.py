"""Each rank gets its share of the data, shuffled anew and alike in every pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from ds_engine.build.data import Loader


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def loader(rank: int, seed: int = 0, dataset: Dataset[int] | None = None) -> Loader:
    return Loader(
        dataset or Numbers(),
        micro_batch=4,
        rank=rank,
        ranks=2,
        seed=seed,
        collate_fn=torch.tensor,
        pin_memory=False,
    )


def test_ranks_share_a_pass_without_overlap() -> None:
    loaders = [loader(0), loader(1)]
    for _ in range(2):
        shares = [[int(x) for batch in one for x in batch] for one in loaders]
        # 11 samples a rank make two micro-batches; what is left over is not a whole one.
        assert [len(share) for share in shares] == [8, 8]
        assert len(set(shares[0]) | set(shares[1])) == 16
    assert len(loaders[0]) == 2


def test_passes_differ_and_the_seed_repeats_them() -> None:
    def passes(seed: int) -> list[list[int]]:
        one = loader(0, seed)
        return [[int(x) for batch in one for x in batch] for _ in range(2)]

    first, second = passes(1)
    assert first != second
    assert passes(1) == [first, second]
    assert passes(2)[0] != first


def test_a_stream_is_used_as_it_is_and_says_so() -> None:
    with pytest.warns(UserWarning, match="IterableDataset"):
        stream = loader(0, dataset=Stream())
    assert [batch.tolist() for batch in stream] == [[0, 1, 2, 3]]


def dealt(
    ranks: int, micro_batch: int, state: dict[str, object] | None = None, count: int | None = None
) -> list[int]:
    """Samples of one pass in the order of steps, over all ranks together; `count`: stop after so many rounds."""
    loaders = [
        Loader(
            Numbers(),
            micro_batch=micro_batch,
            rank=rank,
            ranks=ranks,
            seed=0,
            collate_fn=torch.tensor,
            pin_memory=False,
        )
        for rank in range(ranks)
    ]
    for one in loaders:
        if state is not None:
            one.load_state_dict(state)
    rounds = itertools.islice(zip(*loaders, strict=True), count)
    return [int(x) for batches in rounds for batch in batches for x in batch]


def test_any_number_of_ranks_sees_the_same_samples_in_the_same_steps() -> None:
    alone = dealt(1, 2)
    assert len(alone) == 22
    assert dealt(2, 2) == alone[:20] and dealt(4, 2) == alone[:16] and dealt(2, 4) == alone[:16]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 2), (4, 1), (1, 4), (2, 1)])
def test_a_pass_goes_on_where_it_stood_on_any_number_of_ranks(ranks: int, micro_batch: int) -> None:
    whole = dealt(1, 2)
    first = dealt(2, 2, count=2)
    rest = dealt(ranks, micro_batch, {"epoch": 1, "seen": 8, "num_samples": 22, "seed": 0})
    assert first + rest == whole[: 8 + len(rest)] and len(rest) > 14 - ranks * micro_batch


def test_position_counts_what_was_given_and_the_next_pass_is_whole() -> None:
    one = loader(0)
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    assert state == {"epoch": 1, "seen": 8, "num_samples": 22, "seed": 0}
    rest, second = [b.tolist() for b in iterator], [b.tolist() for b in one]
    other = loader(0)
    other.load_state_dict(state)
    assert [b.tolist() for b in other] == rest
    assert [b.tolist() for b in other] == second and len(second) == len(other) == 2
    # Saved at the very end of a pass: the next one follows.
    other.load_state_dict(state | {"seen": 16})
    assert [b.tolist() for b in other] == second


def test_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="of 21 samples, but now there are 22"):
        loader(0).load_state_dict({"epoch": 1, "seen": 4, "num_samples": 21, "seed": 0})


def test_what_is_left_at_the_end_is_shared_out_if_asked() -> None:
    loaders = [
        Loader(
            Numbers(),
            micro_batch=4,
            rank=rank,
            ranks=2,
            seed=3,
            collate_fn=torch.tensor,
            pin_memory=False,
            drop_last=False,
        )
        for rank in range(2)
    ]
    shares = [[batch.tolist() for batch in one] for one in loaders]
    assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]] == [4, 4, 3]
    assert {x for share in shares for batch in share for x in batch} == set(range(22))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pass_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    """A job that resumes in the middle of a pass starts an iterator more than one that was never interrupted."""
    made = Loader(
        Numbers(),
        micro_batch=4,
        rank=0,
        ranks=1,
        seed=3,
        collate_fn=torch.tensor,
        pin_memory=False,
        num_workers=num_workers,
    )
    before = torch.get_rng_state()
    assert len(list(made)) == 5
    assert torch.equal(torch.get_rng_state(), before)
