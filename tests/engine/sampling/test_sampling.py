"""`ds_engine.sampling`: computed orders, measures on disk, lists by tokens, samples by difficulty. What the section
`data_efficiency` makes of them in a training is in test_data_efficiency.py."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_engine.sampling import (
    Analyzer,
    Criterion,
    CurriculumOrder,
    Packing,
    TokenBatches,
    open_index,
    open_values,
    pack,
    rate_factor,
    write_index,
)
from ds_engine.sampling.shuffle import draws, key_of, shuffled
from harness import ranks

# --- orders


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 255, 1000])
def test_an_order_has_every_sample_once(count: int) -> None:
    places = np.arange(count)
    one, other = shuffled(places, count, key_of(1, 2)), shuffled(places, count, key_of(1, 3))
    assert sorted(one) == sorted(other) == list(range(count))
    assert count < 16 or ((one != other).any() and (one != places).any())
    some = np.array([count - 1, 0, count // 2])
    assert (shuffled(some, count, key_of(1, 2)) == one[some]).all(), "any part of it can be asked for"


def test_orders_are_even() -> None:
    """Each of 12 samples stands first about as often, over 6000 orders: within six standard deviations."""
    first = Counter(int(shuffled(np.array([0]), 12, key_of(5, n))[0]) for n in range(6000))
    assert all(abs(first[i] - 500) < 6 * 22 for i in range(12)), first
    found = np.bincount(draws(key_of(7), 60_000, 6), minlength=6)
    assert (abs(found - 10_000) < 6 * 92).all(), found


def test_orders_are_the_same_everywhere() -> None:
    """Numbers of this version: an order that changes is another training after the next update."""
    assert shuffled(np.arange(8), 8, key_of(1234, 0)).tolist() == GOLDEN
    assert draws(key_of(1234), 4, 1000).tolist() == GOLDEN_DRAWS


GOLDEN = [5, 3, 0, 6, 1, 7, 4, 2]
GOLDEN_DRAWS = [962, 831, 825, 507]


# --- measures


class Words(Dataset[list[int]]):
    """Sentences of different lengths."""

    def __init__(self, count: int = 50) -> None:
        self.lengths = [1 + (7 * i * i + 3 * i) % 23 for i in range(count)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        return [(index + k) % 5 for k in range(self.lengths[index])]


def lengths(batch: list[list[int]]) -> Tensor:
    return torch.tensor([len(sample) for sample in batch])


def occurrences(batch: list[list[int]]) -> np.ndarray[Any, Any]:
    return np.bincount([token for sample in batch for token in sample], minlength=5)


def identity(samples: list[Any]) -> list[Any]:
    return samples


def analyzer(folder: Path, **more: Any) -> Analyzer:
    more = {"totals": {"vocabulary": occurrences}, "batch_size": 7, "collate_fn": identity} | more
    return Analyzer(Words(), {"seqlen": lengths}, folder, **more)


def check_written(folder: Path) -> None:
    data = Words()
    index = open_index(str(folder / "seqlen"))
    assert index.values.tolist() == data.lengths == open_values(str(folder), "seqlen").tolist()
    assert index.order.tolist() == sorted(range(50), key=lambda i: (data.lengths[i], i))
    for bound in (0, 1, 5, 5.5, 99):
        assert index.below(bound) == sum(n <= bound for n in data.lengths)
    counted = Counter(token for i in range(50) for token in data[i])
    assert np.load(folder / "vocabulary" / "total.npy").tolist() == [counted[t] for t in range(5)]
    assert not list(folder.rglob("*-of-*"))


@pytest.mark.parametrize("processes", [0, 2])
def test_alone(tmp_path: Path, processes: int) -> None:
    analyzer(tmp_path, processes=processes).run()
    check_written(tmp_path)
    analyzer(tmp_path).run()  # again, over what is there
    check_written(tmp_path)


@pytest.mark.parametrize("workers", [3, 60])
def test_workers_in_any_order(tmp_path: Path, workers: int) -> None:
    """Also more of them than samples."""
    for worker in reversed(range(1, workers)):
        analyzer(tmp_path).measure(worker, workers)
    with pytest.raises(
        FileNotFoundError, match=rf"1 of {workers} workers have not finished 'seqlen', .*0-of"
    ):
        analyzer(tmp_path).merge(workers)
    assert not (tmp_path / "seqlen").exists()
    analyzer(tmp_path).measure(0, workers)
    analyzer(tmp_path).merge(workers)
    check_written(tmp_path)


@ranks(2)
def test_ranks_share_the_work(tmp_path: Path) -> None:
    seen: list[int] = []

    def counting(batch: list[list[int]]) -> Tensor:
        seen.append(len(batch))
        return lengths(batch)

    Analyzer(
        Words(),
        {"seqlen": counting},
        tmp_path,
        totals={"vocabulary": occurrences},
        batch_size=7,
        collate_fn=identity,
    ).run()
    check_written(tmp_path)
    assert sum(seen) == 25


@ranks(2)
def test_all_ranks_hear_of_a_failure(tmp_path: Path) -> None:
    def broken(batch: list[list[int]]) -> Tensor:
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("no such word")
        return lengths(batch)

    with pytest.raises(RuntimeError, match="no such word"):
        Analyzer(Words(), {"seqlen": broken}, tmp_path, collate_fn=identity).run()


def test_what_is_no_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measure 'sum' gave 1 values for 50 samples"):
        Analyzer(Words(), {"sum": lambda b: lengths(b).sum()}, tmp_path, collate_fn=identity).run()
    with pytest.raises(ValueError, match="sample 0 has the value NaN"):
        Analyzer(Words(), {"nan": lambda b: lengths(b) * np.nan}, tmp_path, collate_fn=identity).run()
    with pytest.raises(ValueError, match="pass measures or totals"):
        Analyzer(Words(), {}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither a folder with manifest.json nor a file .*\.idx"):
        open_index(str(tmp_path / "nothing"))


def foreign(path: Path, code: int, dtype: Any, rows: list[list[int]]) -> str:
    """A file of rows in DeepSpeed's form."""
    sizes = np.array([len(row) for row in rows], dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int64) * np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(rows), 2)
    documents = np.array([0, len(rows)], dtype=np.int64)
    path.with_suffix(".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + documents.tobytes())
    path.with_suffix(".bin").write_bytes(np.array([x for row in rows for x in row], dtype=dtype).tobytes())
    return str(path)


def test_files_of_deepspeed(tmp_path: Path) -> None:
    samples = foreign(tmp_path / "to_sample", 1, np.uint8, [[4, 0], [1], [3, 2, 5]])
    values = foreign(tmp_path / "to_metric", 6, np.uint16, [[10], [300], [1000]])
    index = open_index(samples, values + ".bin")
    assert index.order.tolist() == [4, 0, 1, 3, 2, 5]
    assert index.values.tolist() == [10, 300, 1000, 1000, 10, 1000]
    assert [index.below(bound) for bound in (-1, 9.5, 10, 300, 1e9)] == [0, 0, 2, 3, 6] and index.least == 10
    with pytest.raises(ValueError, match="give index_to_metric_path"):
        open_index(samples).below(1)
    (tmp_path / "seqlen").mkdir()
    foreign(tmp_path / "seqlen" / "seqlen_sample_to_metric", 5, np.int64, [[9], [8], [7]])
    assert open_values(str(tmp_path), "seqlen").tolist() == [9, 8, 7]
    (tmp_path / "to_sample.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="has 2 numbers, but its index says 6"):
        open_index(samples)


# --- tokens


def by_hand(tokens: list[int], packing: Packing) -> list[list[int]]:
    """Lists of places, one sample after the other."""
    found: list[list[int]] = [[]]
    for place, n in enumerate(tokens):
        if n > packing.max_tokens:
            continue
        full = sum(tokens[i] for i in found[-1]) + n > packing.max_tokens
        if full or len(found[-1]) == packing.max_samples:
            found.append([])
        found[-1].append(place)
    return [one for one in found if len(one) >= packing.min_samples]


@pytest.mark.parametrize("seed", range(6))
def test_lists_are_those_of_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(30):
        tokens = random.integers(1, 20, size=random.integers(1, 40))
        packing = Packing(
            max_tokens=int(random.integers(5, 60)),
            min_samples=int(random.integers(1, 4)),
            max_samples=int(random.integers(3, 9)) if seed % 2 else None,
        )
        begins, ends, left_out = pack(tokens, packing)
        places = [i for i, n in enumerate(tokens) if n <= packing.max_tokens]
        found = [places[a:b] for a, b in zip(begins, ends, strict=True)]
        assert found == by_hand(tokens.tolist(), packing)
        assert left_out == len(tokens) - sum(map(len, found))


LENGTHS = np.array(Words(200).lengths)


def token_batches(ranks: int = 1, rank: int = 0, **more: Any) -> TokenBatches:
    packing = Packing(max_tokens=40, picking=more.pop("picking", "random"))
    return TokenBatches(LENGTHS, packing, batch=8, micro_batch=2, ranks=ranks, rank=rank, seed=3, **more)


@pytest.mark.parametrize("picking", ["dataloader", "random", "seqlen"])
def test_any_number_of_ranks_makes_the_same_batches(picking: str) -> None:
    alone = list(token_batches(picking=picking))
    shared = [list(token_batches(2, rank, picking=picking)) for rank in (0, 1)]
    assert [x for pair in zip(*shared, strict=True) for x in pair] == alone
    order = token_batches(picking=picking)
    # two lists side by side, four micro-batches a step
    sizes = [sum(len(x) for x in alone[i : i + 4]) for i in range(0, len(alone), 4)]
    assert sizes == order.sizes().tolist() and len(set(sizes)) > 1
    assert [order.samples_at(i) for i in (0, 7, 8)] == [sizes[0], sizes[0], sizes[1]]
    assert all(LENGTHS[x].sum() <= 80 for x in alone) and len(order) == len(alone)
    flat = [i for x in alone for i in x]
    assert len(set(flat)) == len(flat)
    if picking == "dataloader":
        assert flat == sorted(flat)
    if picking == "seqlen":
        assert (np.diff(LENGTHS[flat]) >= 0).all()


def test_passes_are_shuffled_anew() -> None:
    order = token_batches()
    first = list(order)
    order.epoch = 1
    assert list(order) != first
    order.epoch = 0
    assert list(order) == first
    ordered = token_batches(picking="dataloader")
    first = list(ordered)
    ordered.epoch = 1
    assert list(ordered) == first


def test_samples_that_fit_nowhere_are_told() -> None:
    with pytest.warns(UserWarning, match=r"9 of 200 samples are in no batch"):
        TokenBatches(np.where(np.arange(200) < 9, 99, 10), Packing(max_tokens=50), batch=2)
    with pytest.raises(ValueError, match="make 1 lists of at most 50 tokens, fewer than the 2 of one batch"):
        TokenBatches(np.array([50]), Packing(max_tokens=50), batch=2)


def test_rates() -> None:
    assert [rate_factor(32, 8, method) for method in ("linear", "sqrt", "none")] == [4.0, 2.0, 1.0]


# --- difficulties


def measure(tmp_path: Path, name: str, values: Any) -> Any:
    write_index(tmp_path / name, np.asarray(values))
    return open_index(str(tmp_path / name))


def curriculum(criteria: dict[str, Criterion], count: int, ranks: int = 1, rank: int = 0) -> CurriculumOrder:
    return CurriculumOrder(
        count, criteria, batch=8, micro_batch=2, ranks=ranks, rank=rank, seed=11, passes=40
    )


def steps(order: CurriculumOrder, count: int) -> list[list[int]]:
    batches = iter(order)
    return [[i for _ in range(8 // order.together) for i in next(batches)] for _ in range(count)]


def test_samples_are_easy_enough_and_come_equally_often(tmp_path: Path) -> None:
    values = [(37 * i) % 100 for i in range(100)]
    index = measure(tmp_path, "len", values)
    order = curriculum(
        {"len": Criterion(difficulty=lambda s: 9 + 10 * (s // 20), most=100, index=index)}, 100
    )
    found = steps(order, 400)
    for step, batch in enumerate(found, start=1):
        assert max(values[i] for i in batch) <= 9 + 10 * (step // 20)
    # The first cluster is drawn alone for 19 steps: 152 samples from 10, each 15 or 16 times.
    assert set(Counter(i for batch in found[:19] for i in batch).values()) == {15, 16}
    seen = Counter(i for batch in found for i in batch)
    assert len(seen) == 100
    first = [seen[i] for i in range(100) if values[i] <= 9]
    assert max(first) - min(first) <= 1, "inside a cluster none comes twice before all came"


def test_percentiles_and_several_measures(tmp_path: Path) -> None:
    rare = [i * i for i in range(60)]
    short = [60 - i for i in range(60)]
    criteria = {
        "rare": Criterion(
            difficulty=lambda s: 50, most=100, kind="percentile", index=measure(tmp_path, "rare", rare)
        ),
        "short": Criterion(
            difficulty=lambda s: min(35 + s, 60), most=60, index=measure(tmp_path, "short", short)
        ),
        "told": Criterion(difficulty=lambda s: 7 * s, most=100),
    }
    order = curriculum(criteria, 60)
    found = steps(order, 60)
    for step, batch in enumerate(found, start=1):
        assert all(i < 30 and 60 - i <= 35 + step for i in batch)
    assert {i for batch in found for i in batch} == set(range(30))
    assert order.told(8 * 3) == {"current_difficulties": {"rare": 50, "short": 39, "told": 28}}
    alone = curriculum({"told": criteria["told"]}, 60)
    assert {i for batch in steps(alone, 15) for i in batch} == set(range(60))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_goes_on_exactly_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    index = measure(tmp_path, "len", [(37 * i) % 100 for i in range(100)])
    criteria = {"len": Criterion(difficulty=lambda s: 4 + 3 * s, most=100, index=index)}
    whole = steps(curriculum(criteria, 100), 60)
    # A position in the middle of a step: 25 whole ones, and 4 of 8 samples.
    before = curriculum(criteria, 100)
    steps(before, 30)  # loaders run ahead
    state, position = before.state_dict(25 * 8 + 4), 25 * 8 + 4
    orders = []
    for rank in range(ranks):
        order = curriculum(criteria, 100, ranks, rank)
        order.load_state_dict(state)
        order.start = position if ranks < 4 else 25 * 8  # four ranks take 8 samples at a time
        orders.append(iter(order))
    flat = [i for batch in whole for i in batch][position if ranks < 4 else 25 * 8 :]
    got = [i for _ in range(60 // ranks) for order in orders for i in next(order)]
    assert got == flat[: len(got)]


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    index = measure(tmp_path, "len", range(10, 60))
    late = curriculum({"len": Criterion(difficulty=lambda s: 3, most=100, index=index)}, 50)
    with pytest.raises(
        ValueError, match=r"no sample is easy enough at step 1, .*least in the data are \{'len': 10"
    ):
        next(iter(late))
    with pytest.raises(ValueError, match="has 50 samples, but training_data has 49: run the Analyzer again"):
        curriculum({"len": Criterion(difficulty=lambda s: 3, most=100, index=index)}, 49)
    custom = curriculum({"len": Criterion(difficulty=None, most=100, index=index)}, 50)
    with pytest.raises(ValueError, match="set_difficulties"):
        next(iter(custom))
    with pytest.raises(ValueError, match="no measure 'length'"):
        custom.set_difficulties({"length": lambda s: 1})
    custom.set_difficulties({"len": lambda s: 12})
    assert set(next(iter(custom))) <= {0, 1, 2}
