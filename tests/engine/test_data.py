"""Each rank gets its share of the data, shuffled anew and alike in every pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from ds_engine.data import Loader


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
