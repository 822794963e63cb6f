"""All-to-alls of rows: in two hops the same bits as torch's, encoded within half a step, bytes by formula."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange import HierarchicalAllToAll, PlainAllToAll, QuantizedAllToAll
from harness import ranks

LOCAL = 2


def sizes(width: int, round_: int) -> Tensor:
    """(4, 4): rows that each rank sends to each; some none."""
    return torch.randint(0, 5, (4, 4), generator=torch.Generator().manual_seed(10 * width + round_))


def rows_of(rank: int, table: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(int(table[rank].sum()), width, generator=generator).to(dtype)


def expected(rank: int, table: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    parts = [rows_of(source, table, width, dtype).split(table[source].tolist())[rank] for source in range(4)]
    return torch.cat(parts)


def exchanged(
    how: object, table: Tensor, width: int, dtype: torch.dtype, is_async: bool
) -> tuple[Tensor, int]:
    rank = dist.get_rank()
    own = rows_of(rank, table, width, dtype)
    out = torch.empty(int(table[:, rank].sum()), width, dtype=dtype)
    work = how(out, own, table[:, rank].tolist(), table[rank].tolist(), dist.group.WORLD, is_async)  # type: ignore[operator]
    work.wait()
    return out, work.sent_bytes


@ranks(4, groups_may_stay=True)
def test_two_hops_bring_the_same_rows() -> None:
    rank = dist.get_rank()
    two_hops = HierarchicalAllToAll(LOCAL)
    machine, place = divmod(rank, LOCAL)
    for width, dtype in ((3, torch.float32), (8, torch.bfloat16), (5, torch.uint8)):
        for round_ in range(3):
            table = sizes(width, round_) if round_ else torch.zeros(4, 4, dtype=torch.int64)
            want = expected(rank, table, width, dtype)
            row = width * dtype.itemsize
            out, sent = exchanged(PlainAllToAll(), table, width, dtype, False)
            assert torch.equal(out, want)
            assert sent == row * int(table[rank].sum() - table[rank, rank])
            before = two_hops.across_bytes
            out, sent = exchanged(two_hops, table, width, dtype, round_ == 1)
            assert torch.equal(out, want)
            # To the neighbour what it brings on; from all neighbours to this place on other machines.
            by_place = table.view(2, LOCAL, 2, LOCAL)
            inside = by_place[machine, place, :, 1 - place].sum()
            across = by_place[machine, :, 1 - machine, place].sum()
            assert two_hops.across_bytes - before == row * int(across)
            assert sent == row * int(inside + across) + 16


@ranks(4, groups_may_stay=True)
def test_encoded_rows_are_off_by_half_a_step() -> None:
    for bits, steps in ((8, 127), (4, 7)):
        for over in (None, HierarchicalAllToAll(LOCAL)):
            how = QuantizedAllToAll(bits, over)
            for width, dtype in ((300, torch.float32), (13, torch.float32), (16, torch.bfloat16)):
                table = sizes(width, 1)
                out, sent = exchanged(how, table, width, dtype, True)
                want = expected(dist.get_rank(), table, width, dtype)
                scale = (
                    torch.cat([b.abs().amax(1, True).expand_as(b) for b in want.float().split(256, 1)], 1)
                    / steps
                )
                rounding = torch.finfo(dtype).eps * want.float().abs().amax()
                assert ((out.float() - want.float()).abs() <= scale / 2 * (1 + 1e-6) + rounding).all()
                assert not torch.equal(out, want)
                numel = (width + 7) // 8 * 8
                assert how.row_bytes(width) == numel * bits // 8 + 4 * ((width + 255) // 256)
                if over is None:
                    others = int(table[dist.get_rank()].sum() - table[dist.get_rank(), dist.get_rank()])
                    assert sent == others * how.row_bytes(width)
    empty = torch.zeros(4, 4, dtype=torch.int64)
    assert exchanged(QuantizedAllToAll(), empty, 8, torch.float32, True)[1] == 0
    table = sizes(4, 1)
    out, _ = exchanged(QuantizedAllToAll(), table, 4, torch.int64, False)
    assert torch.equal(out, expected(dist.get_rank(), table, 4, torch.int64))


@ranks(4, groups_may_stay=True)
def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="local_size must be positive"):
        HierarchicalAllToAll(0)
    with pytest.raises(ValueError, match="bits must be 4 or 8, but is 3"):
        QuantizedAllToAll(3)
    with pytest.raises(ValueError, match="local_size must divide the number of ranks 4, but is 3"):
        exchanged(HierarchicalAllToAll(3), sizes(2, 1), 2, torch.float32, False)
